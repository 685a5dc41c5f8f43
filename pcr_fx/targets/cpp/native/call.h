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

// A state or an output of all blocks and samples, in any order of these, samples in rows: a sample's numbers lie together. Where
// blocks have a table, an entry may be null.
struct Result {
  char* base;
  int64_t block, sample, row;  // bytes from one to the next
  int64_t in_row;              // samples; 0: all
  void* const* table;
  char* of(int64_t l) const { return table ? static_cast<char*>(table[l]) : base ? base + l * block : nullptr; }
  int64_t offset(int64_t n) const { return in_row ? n / in_row * row + n % in_row * sample : n * sample; }
};

// What a call is given; Python fills it as an array of 64-bit words, in this order.
struct Call {
  int64_t length, samples, threads;
  const real* initial;    // [N, d]
  real* trajectory;       // [L, N, d], or a row [N, d] for each state that is wanted; null: none is
  const int64_t* rows;    // which row each block's state goes to, none where it is negative; null: each its own
  Column cotangents;      // [N, d] each; adjoint only
  real* d_initial;        // [N, d]; adjoint only
  double* iteration;      // tolerance, most iterations; gets iterations, residual, outcome; Newton only
  Column inputs[Body::inputs];
  Result results[Body::results];      // where they go, or for the adjoint their cotangents; null where there are none
  real* gradients[Body::inputs];      // [L, ...] or [...] where shared, contiguous; null where there is none
};

// A tile is as many samples as V has lanes. In memory the numbers of a sample lie together; in a tile, the same number of
// all its samples does.
template <class V> constexpr int k_width = k_is_vector<V> ? k_lanes : 1;

// Samples lie `stride` numbers apart. Lanes beyond the last sample repeat it.
template <class V>
INLINE void k_read(V* RESTRICT tile, const real* RESTRICT rows, int size, int64_t count, int64_t stride) {
  if constexpr (!k_is_vector<V>) {
    for (int i = 0; i < size; ++i) tile[i] = rows[i];
  } else {
    int i = 0;
    if (stride == 0) {  // what is the same for all, such as the gradient of a sum
      for (; i < size; ++i) tile[i] = k_fill<V>(rows[i]);
    } else if (count == k_lanes) {
      if (size == 1 && stride == 1) return void(std::memcpy(tile, rows, sizeof(V)));
      for (; i + k_lanes <= size; i += k_lanes) {
        for (int w = 0; w < k_lanes; ++w) std::memcpy(tile + i + w, rows + w * stride + i, sizeof(V));
        k_turn(tile + i);
      }
    }
    for (; i < size; ++i)
      for (int w = 0; w < k_lanes; ++w) tile[i][w] = rows[(w < count ? w : count - 1) * stride + i];
  }
}
template <class V, class T>
INLINE void k_write(const V* RESTRICT tile, T* RESTRICT rows, int size, int64_t count, int64_t stride) {
  if constexpr (!k_is_vector<V>) {
    for (int i = 0; i < size; ++i) rows[i] = T(tile[i]);
  } else if (count == k_lanes) {
    int first = 0;
    if constexpr (std::is_same_v<T, real>) {
      if (size == 1 && stride == 1) return void(std::memcpy(rows, tile, sizeof(V)));
      for (; first + k_lanes <= size; first += k_lanes) {
        vec square[k_lanes];
        std::memcpy(square, tile + first, sizeof square);
        k_turn(square);
        for (int w = 0; w < k_lanes; ++w) std::memcpy(rows + w * stride + first, square + w, sizeof(vec));
      }
    }
    for (int w = 0; w < k_lanes; ++w)
      for (int i = first; i < size; ++i) rows[w * stride + i] = T(tile[i][w]);
  } else {
    for (int w = 0; w < count; ++w)
      for (int i = 0; i < size; ++i) rows[w * stride + i] = T(tile[i][w]);
  }
}
template <class V> INLINE void k_read(V* RESTRICT tile, const real* RESTRICT rows, int size, int64_t count) {
  k_read<V>(tile, rows, size, count, size);
}
template <class V> INLINE void k_write(const V* RESTRICT tile, real* RESTRICT rows, int size, int64_t count) {
  k_write<V>(tile, rows, size, count, size);
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

// Where in a block's part of each result the samples of each tile begin; -1 where they lie in several rows.
template <class V> class Places {
 public:
  Places(const Call& call, Samples<V> samples) : call(call), samples(samples), offsets(samples.tiles() * Body::results) {
    for (int64_t t = 0; t < samples.tiles(); ++t)
      for (int k = 0; k < Body::results; ++k) {
        const int64_t in_row = call.results[k].in_row, n = samples.begin(t);
        const bool apart = in_row && n % in_row + samples.count(t) > in_row;
        offsets[t * Body::results + k] = apart ? -1 : call.results[k].offset(n);
      }
  }
  template <class T> INLINE_MEMBER void write(int64_t l, int64_t t, int k, const V* numbers, int size) const {
    char* part = call.results[k].of(l);
    if (!part) return;
    const int64_t offset = offsets[t * Body::results + k], stride = call.results[k].sample / int64_t(sizeof(T));
    if (offset >= 0) return k_write<V>(numbers, reinterpret_cast<T*>(part + offset), size, samples.count(t), stride);
    if constexpr (k_is_vector<V>)
      for (int w = 0; w < samples.count(t); ++w) {
        T* row = reinterpret_cast<T*>(part + call.results[k].offset(samples.begin(t) + w));
        for (int i = 0; i < size; ++i) row[i] = T(numbers[i][w]);
      }
  }
  // Whether there was something to read.
  INLINE_MEMBER bool read(int64_t l, int64_t t, int k, V* numbers, int size) const {
    const char* part = call.results[k].of(l);
    if (!part) return false;
    const int64_t offset = offsets[t * Body::results + k], stride = call.results[k].sample / int64_t(sizeof(real));
    if (offset >= 0) {
      k_read<V>(numbers, reinterpret_cast<const real*>(part + offset), size, samples.count(t), stride);
    } else if constexpr (k_is_vector<V>) {
      for (int w = 0; w < k_lanes; ++w) {
        const int64_t n = samples.begin(t) + (w < samples.count(t) ? w : samples.count(t) - 1);
        const real* row = reinterpret_cast<const real*>(part + call.results[k].offset(n));
        for (int i = 0; i < size; ++i) numbers[i][w] = row[i];
      }
    }
    return true;
  }

 private:
  const Call& call;
  const Samples<V> samples;
  std::vector<int64_t> offsets;
};
