// What a call is given, and how its numbers get to the printed functions, which `Body` calls.
// Numbers of a sample lie together in memory: states [N, d], trajectories [L, N, d].

// A tensor per block: `base + l * stride` (bytes), or `table[l]` where there is a table. An entry may be null.
struct Column {
  const char* base;
  int64_t stride;
  const void* const* table;
  const real* at(int64_t l) const {
    return static_cast<const real*>(table ? table[l] : static_cast<const void*>(base ? base + l * stride : nullptr));
  }
};

// What a call is given; Python fills it as an array of 64-bit words, in this order.
struct Call {
  int64_t length, samples, threads;
  const real* initial;    // [N, d]
  real* trajectory;       // [L, N, d], or a row [N, d] for each state that is wanted
  const int64_t* rows;    // which row each block's state goes to, none where it is negative; null: each its own
  Column cotangents;      // [N, d] each; adjoint only
  real* d_initial;        // [N, d]; adjoint only
  double* iteration;      // tolerance, most iterations; gets iterations, residual, outcome; Newton only
  Column inputs[Body::inputs];
  real* gradients[Body::inputs];      // [L, ...] or [...] where shared, contiguous; null where there is none
};

// A tile is as many samples as V has lanes. In memory the numbers of a sample lie together; in a tile, the same number of
// all its samples does.
template <class V> constexpr int k_width = k_is_vector<V> ? k_lanes : 1;

// Lanes beyond the last sample repeat it.
template <class V> INLINE void k_read(V* RESTRICT tile, const real* RESTRICT rows, int size, int64_t count) {
  if constexpr (!k_is_vector<V>) {
    for (int i = 0; i < size; ++i) tile[i] = rows[i];
  } else {
    for (int i = 0; i < size; ++i)
      for (int w = 0; w < k_lanes; ++w) tile[i][w] = rows[(w < count ? w : count - 1) * size + i];
  }
}
template <class V> INLINE void k_write(const V* RESTRICT tile, real* RESTRICT rows, int size, int64_t count) {
  if constexpr (!k_is_vector<V>) {
    for (int i = 0; i < size; ++i) rows[i] = tile[i];
  } else if (count == k_lanes) {
    for (int w = 0; w < k_lanes; ++w)
      for (int i = 0; i < size; ++i) rows[w * size + i] = tile[i][w];
  } else {
    for (int w = 0; w < count; ++w)
      for (int i = 0; i < size; ++i) rows[w * size + i] = tile[i][w];
  }
}

template <class V> struct Samples {
  int64_t first, last;
  int64_t tiles() const { return (last - first + k_width<V> - 1) / k_width<V>; }
  int64_t begin(int64_t tile) const { return first + tile * k_width<V>; }
  int64_t count(int64_t tile) const {
    const int64_t left = last - begin(tile);
    return left < k_width<V> ? left : k_width<V>;
  }
};

// The inputs of a block for the samples of a tile: those that samples share where they lie, the others as a tile.
template <class V> struct Inputs {
  const void* pointers[Body::inputs + 1];
  V own[Body::own_numbers + 1];
};
template <class V> INLINE void k_locate(const Call& call, int64_t l, Inputs<V>& in) {
  UNROLL for (int k = 0; k < Body::inputs; ++k) in.pointers[k] = call.inputs[k].at(l);
}
template <class V> INLINE void k_fetch(const Call& call, int64_t l, int64_t begin, int64_t count, Inputs<V>& in) {
  int used = 0;
  for (int k = 0; k < Body::inputs; ++k)
    if (Body::own[k]) {
      k_read<V>(in.own + used, call.inputs[k].at(l) + begin * Body::sizes[k], Body::sizes[k], count);
      in.pointers[k] = in.own + used;
      used += Body::sizes[k];
    }
}
