// Sums of products of two vectors over all blocks and samples: the gradients of weights that all blocks share.
//
// To add each product by itself would read and write the whole matrix for it. The vectors are kept until there are some
// hundred of each, and then multiplied as two matrices, a part of whose product stays in registers from the first pair to the
// last.

// Pairs of vectors that are kept: those of a layer of some hundred numbers stay in the second cache. Of long ones fewer are, so
// that they take 4 MB at the most (8 in double precision), until they are too few to be worth it.
constexpr int64_t k_most_factors = 256, k_least_factors = 32, k_most_numbers = 1 << 20;

// Rows of a product that are in registers at a time: as many as leave few over. The registers hold twice as many sums, or
// with AVX-512 four times, and of both factors one number or vector each.
constexpr int k_high(int rows) {
  for (int many = 6; many >= 4; --many)
    if (rows % many == 0) return many;
  return rows < 6 ? rows : 6;
}

// Vectors of a strip of `right`.
constexpr int k_wide(int columns) {
  return columns < k_block_vectors * k_lanes ? (columns + k_lanes - 1) / k_lanes : k_block_vectors;
}

// The vectors of one sum. `left` lies in strips of `k_high` numbers of each vector, one strip behind the other, and within a
// strip as many vectors together as there are lanes of samples; `right` in strips of some vectors' lanes.
struct Factors {
  const int most;
  std::unique_ptr<vec[]> left, right;
  int count = 0;
  real* out = nullptr;
  void (*multiply)(Factors&) = nullptr;

  // For a sum of so many rows and columns, of so many pairs.
  Factors(int rows, int columns, int64_t pairs)
      : most(in_lanes(std::min(pairs, std::clamp(k_most_numbers / (rows + columns + 1), k_least_factors, k_most_factors)))),
        left(new vec[vectors(rows, k_high(rows))]), right(new vec[vectors(columns, k_wide(columns) * k_lanes)]) {}
  // Numbers from one strip to the next, of so many of each vector. Strips that began at a power of two's distance would share
  // the few places that the nearest cache has for them.
  int64_t strip(int some) const { return most * some + 64 / int64_t(sizeof(real)); }
  // Adds what is kept to the sum.
  void finish() {
    if (count) multiply(*this);
    count = 0;
  }

 private:
  static int in_lanes(int64_t pairs) { return (pairs + k_lanes - 1) / k_lanes * k_lanes; }
  int64_t vectors(int size, int some) const { return size ? (size + some - 1) / some * strip(some) / k_lanes : 0; }
};

// A block of the product, `height` by `width` numbers. Rows of `out` are `columns` apart.
template <int lanes, int high, int wide, int height, int width, int columns>
INLINE void k_multiply_block(real* RESTRICT out, const real* RESTRICT left, const vec* RESTRICT right, int count) {
  constexpr int vectors = (width + k_lanes - 1) / k_lanes;
  vec sums[height][vectors] = {};
  for (int k = 0; k < count; k += lanes)
    for (int w = 0; w < lanes; ++w)
      UNROLL for (int i = 0; i < height; ++i)
        UNROLL for (int v = 0; v < vectors; ++v)
          sums[i][v] = sums[i][v] + right[(k + w) * wide + v] * left[k * high + i * lanes + w];
  UNROLL for (int i = 0; i < height; ++i) {
    real line[vectors * k_lanes];
    std::memcpy(line, sums[i], sizeof line);
    for (int j = 0; j < width; ++j) out[i * columns + j] += line[j];
  }
}

// A strip of `right` by all of `left`.
template <int lanes, int rows, int columns, int width>
INLINE void k_multiply_strip(const Factors& factors, int first) {
  constexpr int high = k_high(rows), wide = k_wide(columns), whole = rows / high;
  const real* left = reinterpret_cast<const real*>(factors.left.get());
  const vec* right = &factors.right[first / (wide * k_lanes) * factors.strip(wide * k_lanes) / k_lanes];
  real* out = factors.out + first;
  for (int i = 0; i < whole; ++i)
    k_multiply_block<lanes, high, wide, high, width, columns>(
        out + i * high * columns, left + i * factors.strip(high), right, factors.count);
  if constexpr (rows > whole * high)
    k_multiply_block<lanes, high, wide, rows - whole * high, width, columns>(
        out + whole * high * columns, left + whole * factors.strip(high), right, factors.count);
}

template <int lanes, int rows, int columns> OUTLINE void k_multiply(Factors& factors) {
  constexpr int width = k_wide(columns) * k_lanes, whole = columns - columns % width;
  for (int j = 0; j < whole; j += width) k_multiply_strip<lanes, rows, columns, width>(factors, j);
  if constexpr (columns > whole) k_multiply_strip<lanes, rows, columns, columns - whole>(factors, whole);
}

// `many` numbers that lie `stride` apart, each of all lanes; zero in those that are not wanted.
template <class V, int stride, class A>
INLINE void k_copy_numbers(real* RESTRICT to, const A* RESTRICT from, int many, ivec wanted) {
  for (int i = 0; i < many; ++i) {
    V number = k_fill<V>(from[i * stride]);
    if constexpr (k_is_vector<V>) number = k_select(wanted, number, V{});
    std::memcpy(to + i * (sizeof(V) / sizeof(real)), &number, sizeof number);
  }
}

// Keeps `a` and `b`, of the first `count` samples where each lane is one: those of others are zero.
template <class V, int rows, int columns, int a_stride, int b_stride, class A, class B>
OUTLINE void k_collect(Factors& factors, const A* RESTRICT a, const B* RESTRICT b, int64_t count) {
  constexpr int lanes = k_is_vector<V> ? k_lanes : 1, high = k_high(rows), width = k_wide(columns) * k_lanes;
  factors.multiply = k_multiply<lanes, rows, columns>;
  if (factors.count + lanes > factors.most) factors.finish();
  const ivec wanted = k_first_lanes(count);
  real* left = reinterpret_cast<real*>(factors.left.get()) + factors.count * high;
  constexpr int whole = rows / high;
  for (int i = 0; i < whole; ++i)
    k_copy_numbers<V, a_stride>(left + i * factors.strip(high), a + i * high * a_stride, high, wanted);
  if constexpr (rows > whole * high)
    k_copy_numbers<V, a_stride>(left + whole * factors.strip(high), a + whole * high * a_stride, rows - whole * high, wanted);
  real* right = reinterpret_cast<real*>(factors.right.get()) + factors.count * width;
  for (int j = 0; j < columns; j += k_is_vector<V> ? k_lanes : width) {
    real* place = right + j / width * factors.strip(width) + j % width;
    if constexpr (k_is_vector<V>) {
      vec square[k_lanes] = {};
      k_copy_numbers<V, b_stride>(reinterpret_cast<real*>(square), b + j * b_stride, std::min(columns - j, k_lanes), wanted);
      k_turn(square);
      for (int w = 0; w < k_lanes; ++w) std::memcpy(place + w * width, square + w, sizeof(vec));
    } else {
      const int many = std::min(columns - j, width);
      k_copy_numbers<V, b_stride>(place, b + j * b_stride, many, wanted);
      std::fill(place + many, place + width, real(0));
    }
  }
  factors.count += lanes;
}
