// Sums over samples of products of two vectors, which are matrices: the gradients of weights.

// How much of a matrix is summed in registers at a time: rows, and vectors of each. With AVX-512 there are 32 registers.
constexpr int k_block_rows = 4, k_block_vectors = VECTOR_BYTES == 64 ? 4 : 2;

// A square of lanes by lanes across its diagonal.
OUTLINE void k_turn(vec* square) {
#if defined(__GNUC__) && !defined(__clang__)
  // Halves change places, then halves of halves, down to neighbours.
  UNROLL for (int half = 1; half < k_lanes; half *= 2) {
    ivec upper, lower;
    UNROLL for (int w = 0; w < k_lanes; ++w) {
      upper[w] = w & half ? k_lanes + w - half : w;
      lower[w] = w & half ? k_lanes + w : w + half;
    }
    UNROLL for (int i = 0; i < k_lanes; ++i)
      if (!(i & half)) {
        const vec above = square[i], below = square[i + half];
        square[i] = __builtin_shuffle(above, below, upper);
        square[i + half] = __builtin_shuffle(above, below, lower);
      }
  }
#else
  real all[k_lanes][k_lanes], turned[k_lanes][k_lanes];
  std::memcpy(all, square, sizeof all);
  for (int i = 0; i < k_lanes; ++i)
    for (int w = 0; w < k_lanes; ++w) turned[w][i] = all[i][w];
  std::memcpy(square, turned, sizeof all);
#endif
}

// `out[i, j] += sum over w of left[i][w] * right[w][j]` of a block of `out`, rows `columns` apart, that is `width` numbers
// wide. Rows of `left` are lanes, those of `right` are `stride` vectors long.
template <int height, int vectors, int width, int columns, int stride>
INLINE void k_add_block(real* RESTRICT out, const real* RESTRICT left, const vec* RESTRICT right, int lanes) {
  vec sums[height][vectors] = {};
  for (int w = 0; w < lanes; ++w)
    UNROLL for (int i = 0; i < height; ++i)
      UNROLL for (int v = 0; v < vectors; ++v)
        sums[i][v] = sums[i][v] + right[w * stride + v] * left[i * k_lanes + w];
  UNROLL for (int i = 0; i < height; ++i)
    UNROLL for (int v = 0; v < vectors; ++v) {
      constexpr int whole = width / k_lanes, rest = width % k_lanes;
      real* place = out + i * columns + v * k_lanes;
      if (v < whole) {
        vec before;
        std::memcpy(&before, place, sizeof before);
        before = before + sums[i][v];
        std::memcpy(place, &before, sizeof before);
      } else {
        real line[k_lanes];
        std::memcpy(line, &sums[i][v], sizeof line);
        for (int j = 0; j < rest; ++j) place[j] += line[j];
      }
    }
}

// As many columns as one block is wide.
template <int rows, int vectors, int width, int columns, int stride>
INLINE void k_add_columns(real* RESTRICT out, const real* RESTRICT left, const vec* RESTRICT right, int lanes) {
  constexpr int whole = rows - rows % k_block_rows;
  for (int i = 0; i < whole; i += k_block_rows)
    k_add_block<k_block_rows, vectors, width, columns, stride>(out + i * columns, left + i * k_lanes, right, lanes);
  if constexpr (rows > whole)
    k_add_block<rows - whole, vectors, width, columns, stride>(out + whole * columns, left + whole * k_lanes, right, lanes);
}

// `out[i, j] += a[i] * b[j]`, of the first `count` samples where each lane is one. Then it is a product of matrices. Without
// vectors of samples `out` may be taken for zero, whatever is there: to fill and then to read it costs as much as the product.
template <class V, int rows, int columns, int a_stride, int b_stride, bool from_zero>
OUTLINE void k_add_products(real* RESTRICT out, const V* RESTRICT a, const V* RESTRICT b, int64_t count) {
  if constexpr (!k_is_vector<V>) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; ++j) {
        const real before = from_zero ? real(0) : out[i * columns + j];
        out[i * columns + j] = before + a[i * a_stride] * b[j * b_stride];
      }
  } else {
    constexpr int stride = (columns + k_lanes - 1) / k_lanes, wide = k_block_vectors * k_lanes;
    constexpr int whole = columns - columns % wide, rest = columns - whole;
    real left[rows * k_lanes];
    for (int i = 0; i < rows; ++i) std::memcpy(left + i * k_lanes, &a[i * a_stride], sizeof(vec));
    vec right[k_lanes * stride];
    for (int j = 0; j < stride; ++j) {
      vec square[k_lanes];
      for (int i = 0; i < k_lanes; ++i) square[i] = j * k_lanes + i < columns ? b[(j * k_lanes + i) * b_stride] : vec{};
      k_turn(square);
      for (int w = 0; w < k_lanes; ++w) right[w * stride + j] = square[w];
    }
    for (int j = 0; j < whole; j += wide)
      k_add_columns<rows, k_block_vectors, wide, columns, stride>(out + j, left, right + j / k_lanes, int(count));
    if constexpr (rest > 0)
      k_add_columns<rows, (rest + k_lanes - 1) / k_lanes, rest, columns, stride>(
          out + whole, left, right + whole / k_lanes, int(count));
  }
}
