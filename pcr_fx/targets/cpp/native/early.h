// What is known of blocks before they are gone through, computed for a vector of them at once: each lane is a block. So weights
// that all blocks share are read once for many of them, and sums stay in registers.

// Numbers that are held of such: those of some blocks, in the second cache.
constexpr int64_t k_held_early = 1 << 15;

// So many numbers of some rows, each of which is a lane.
INLINE void k_gather(vec* RESTRICT tile, const real* const* rows, int size) {
  int i = 0;
  for (; i + k_lanes <= size; i += k_lanes) {
    for (int w = 0; w < k_lanes; ++w) std::memcpy(tile + i + w, rows[w] + i, sizeof(vec));
    k_turn(tile + i);
  }
  for (; i < size; ++i)
    for (int w = 0; w < k_lanes; ++w) tile[i][w] = rows[w][i];
}

// Numbers of a block's own inputs that are read so.
constexpr int k_read_early() {
  int size = 0;
  for (int k = 0; k < Body::inputs; ++k)
    if (Body::read_early[k] && !Body::shared[k]) size += Body::sizes[k];
  return size;
}

template <class V> class Early {
 public:
  static constexpr bool exists = !k_is_vector<V> && Body::early_numbers > 0;

  Early(const Call& call, Samples<V> samples) : call(call), samples(samples), many(samples.last - samples.first) {
    if constexpr (exists) {
      const int64_t fit = k_held_early / std::max<int64_t>(1, many * Body::early_numbers) / k_lanes * k_lanes;
      blocks = std::min(std::max<int64_t>(fit, k_lanes), call.length);
      numbers.resize(blocks * many * Body::early_numbers);
      state.resize(Body::dimension), inputs.resize(k_read_early()), made.resize(Body::early_numbers);
    }
  }

  // That of a block and sample; blocks come one after the other, up or down.
  INLINE_MEMBER const real* of(int64_t l, int64_t n) {
    if constexpr (exists) {
      if (l >= last) hold(l, std::min(l + blocks, call.length));
      if (l < first) hold(std::max<int64_t>(0, l + 1 - blocks), l + 1);
      return &numbers[((l - first) * many + n - samples.first) * Body::early_numbers];
    }
    return nullptr;
  }

 private:
  OUTLINE_MEMBER void hold(int64_t from, int64_t to) {
    constexpr int size = Body::early_numbers;
    first = from, last = to;
    for (int64_t n = 0; n < many; ++n)
      for (int64_t l = first; l < last; l += k_lanes) {
        const int64_t count = std::min<int64_t>(last - l, k_lanes);
        real* out = &numbers[((l - first) * many + n) * size];
        if (count > k_lanes / 2) compute(l, count, samples.first + n, out);
        else for (int64_t i = 0; i < count; ++i) compute(l + i, samples.first + n, out + i * many * size);
      }
  }

  const real* state_before(int64_t l, int64_t n) const {
    return (l ? call.trajectory + (l - 1) * call.samples * Body::dimension : call.initial) + n * Body::dimension;
  }
  const real* input(int k, int64_t l, int64_t n) const {
    return call.inputs[k].at(l) + (Body::own[k] ? n * Body::sizes[k] : 0);
  }

  // Of one block and sample.
  void compute(int64_t l, int64_t n, real* out) {
    const void* pointers[Body::inputs + 1];
    for (int k = 0; k < Body::inputs; ++k)
      if (Body::read_early[k]) pointers[k] = input(k, l, n);
    Body::early<real>(Body::early_state ? state_before(l, n) : nullptr, pointers, out);
  }

  // Of `count` blocks from `l` on, and a sample. Lanes beyond the last block repeat it.
  void compute(int64_t l, int64_t count, int64_t n, real* out) {
    const auto block = [&](int w) ALWAYS_INLINE { return l + (w < count ? w : count - 1); };
    const real* rows[k_lanes];
    vec* tile = inputs.data();
    const void* pointers[Body::inputs + 1];
    if (Body::early_state) {
      for (int w = 0; w < k_lanes; ++w) rows[w] = state_before(block(w), n);
      k_gather(state.data(), rows, Body::dimension);
    }
    for (int k = 0; k < Body::inputs; ++k) {
      if (!Body::read_early[k]) continue;
      pointers[k] = input(k, l, n);
      if (Body::shared[k]) continue;
      for (int w = 0; w < k_lanes; ++w) rows[w] = input(k, block(w), n);
      k_gather(tile, rows, Body::sizes[k]);
      pointers[k] = tile;
      tile += Body::sizes[k];
    }
    Body::early<vec>(state.data(), pointers, made.data());
    k_write<vec>(made.data(), out, Body::early_numbers, count, many * Body::early_numbers);
  }

  const Call& call;
  const Samples<V> samples;
  const int64_t many;
  int64_t blocks = 0, first = 0, last = 0;  // as many as are held, and which
  std::vector<real> numbers;
  // Of a vector of blocks. An operand of a block may be larger than there is room for on the stack.
  std::vector<vec> state, inputs, made;
};
