// One chain, block after block. `Body` tells sizes and calls the printed functions.
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
  real* trajectory;       // [L, N, d]
  Column cotangents;      // [N, d] each; adjoint only
  real* d_initial;        // [N, d]; adjoint only
  Column inputs[Body::inputs];
  real* gradients[Body::inputs];      // [L, ...] or [...] where shared, contiguous; null where there is none
};

// A tile: as many samples as V has lanes, with the numbers of one sample apart and those of all samples together.
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

// The inputs of block l for the samples of a tile: shared ones in place, a sample's own ones as a tile.
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

#ifdef FORWARD
template <class V> static void k_forward(const Call& call, Samples<V> samples) {
  constexpr int d = Body::dimension;
  const int64_t tiles = samples.tiles();
  std::vector<V> states(tiles * d);
  for (int64_t t = 0; t < tiles; ++t)
    k_read<V>(&states[t * d], call.initial + samples.begin(t) * d, d, samples.count(t));
  Inputs<V> in;
  for (int64_t l = 0; l < call.length; ++l) {
    k_locate<V>(call, l, in);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = samples.begin(t), count = samples.count(t);
      k_fetch<V>(call, l, begin, count, in);
      V next[d];
      Body::step<V>(&states[t * d], in.pointers, next);
      for (int i = 0; i < d; ++i) states[t * d + i] = next[i];
      k_write<V>(next, call.trajectory + (l * call.samples + begin) * d, d, count);
    }
  }
}
#endif

#ifdef ADJOINT
// Where a thread adds up gradients: those of all samples in memory of its own, first thread excepted.
template <class V> static void k_adjoint(const Call& call, Samples<V> samples, real* const* gradients) {
  constexpr int d = Body::dimension;
  const int64_t tiles = samples.tiles();
  std::vector<V> adjoints(tiles * d, V{});
  // Sums over samples: with a sample in each lane, lanes are added up only when all tiles are through.
  std::vector<V> sums(k_is_vector<V> ? Body::summed_numbers + 1 : 1, V{}), kept(k_is_vector<V> ? Body::kept_numbers + 1 : 1, V{});
  Inputs<V> in;
  V own[Body::own_numbers + 1];
  for (int64_t l = call.length - 1; l >= 0; --l) {
    k_locate<V>(call, l, in);
    V* out[Body::inputs + 1] = {};
    {
      V* sum = sums.data();
      V* keep = kept.data();
      V* mine = own;
      UNROLL for (int k = 0; k < Body::inputs; ++k) {
        if (!Body::differentiable[k]) continue;
        const int size = Body::sizes[k];
        if (Body::own[k]) { out[k] = mine; mine += size; continue; }
        if constexpr (k_is_vector<V>) {
          out[k] = Body::shared[k] ? keep : sum;
          (Body::shared[k] ? keep : sum) += size;
          if (!Body::shared[k]) for (int i = 0; i < size; ++i) out[k][i] = V{};
        } else {
          out[k] = gradients[k] + (Body::shared[k] ? 0 : l * size);
          if (!Body::shared[k]) for (int i = 0; i < size; ++i) out[k][i] = 0;
        }
      }
    }
    const real* cotangent = call.cotangents.at(l);
    // The last tile first: it may have lanes without a sample, whose share is taken out again.
    for (int64_t t = tiles - 1; t >= 0; --t) {
      const int64_t begin = samples.begin(t), count = samples.count(t);
      const real* previous = l ? call.trajectory + (l - 1) * call.samples * d : call.initial;
      V state[d], next[d], *adjoint = &adjoints[t * d];
      k_read<V>(state, previous + begin * d, d, count);
      k_fetch<V>(call, l, begin, count, in);
      if (cotangent) {
        k_read<V>(next, cotangent + begin * d, d, count);
        for (int i = 0; i < d; ++i) adjoint[i] = adjoint[i] + next[i];
      }
      V before[Body::kept_numbers + 1];
      const bool partial = k_is_vector<V> && count < k_width<V>;
      if (partial) for (int i = 0; i < Body::kept_numbers; ++i) before[i] = kept[i];
      Body::pullback<V>(state, in.pointers, adjoint, next, out);
      for (int i = 0; i < d; ++i) adjoint[i] = next[i];
      if constexpr (k_is_vector<V>) {
        if (partial) {
          for (int w = count; w < k_lanes; ++w) {
            for (int i = 0; i < Body::summed_numbers; ++i) sums[i][w] = 0;
            for (int i = 0; i < Body::kept_numbers; ++i) kept[i][w] = before[i][w];
          }
        }
      }
      for (int k = 0; k < Body::inputs; ++k) {
        if (!Body::own[k] || !Body::differentiable[k]) continue;
        const int64_t row = (Body::shared[k] ? 0 : l * call.samples) + begin;
        real* rows = call.gradients[k] + row * Body::sizes[k];
        if (Body::shared[k] && l < call.length - 1) {  // one sample's sum over the blocks
          V total[Body::sizes[k] + 1];
          k_read<V>(total, rows, Body::sizes[k], count);
          for (int i = 0; i < Body::sizes[k]; ++i) out[k][i] = out[k][i] + total[i];
        }
        k_write<V>(out[k], rows, Body::sizes[k], count);
      }
    }
    if constexpr (k_is_vector<V>) {
      for (int k = 0; k < Body::inputs; ++k)
        if (Body::differentiable[k] && !Body::own[k] && !Body::shared[k])
          for (int i = 0; i < Body::sizes[k]; ++i) {
            real total = 0;
            for (int w = 0; w < k_lanes; ++w) total += out[k][i][w];
            gradients[k][l * Body::sizes[k] + i] = total;
          }
    }
  }
  if constexpr (k_is_vector<V>) {
    int used = 0;
    for (int k = 0; k < Body::inputs; ++k)
      if (Body::differentiable[k] && !Body::own[k] && Body::shared[k])
        for (int i = 0; i < Body::sizes[k]; ++i, ++used) {
          real total = 0;
          for (int w = 0; w < k_lanes; ++w) total += kept[used][w];
          gradients[k][i] += total;
        }
  }
  for (int64_t t = 0; t < tiles; ++t)
    k_write<V>(&adjoints[t * d], call.d_initial + samples.begin(t) * d, d, samples.count(t));
}

// How many numbers the gradient of input k has, over all blocks; 0 where samples have their own, or none is wanted.
INLINE int64_t k_gradient_numbers(const Call& call, int k) {
  if (!Body::differentiable[k] || Body::own[k]) return 0;
  return (Body::shared[k] ? 1 : call.length) * int64_t(Body::sizes[k]);
}
#endif

template <class V> static Samples<V> k_part(const Call& call, int64_t part, int64_t parts) {
  const int64_t tiles = Samples<V>{0, call.samples}.tiles();
  const int64_t first = tiles * part / parts * k_width<V>, last = tiles * (part + 1) / parts * k_width<V>;
  return {first, last < call.samples ? last : call.samples};
}

template <class V> static void k_run(const Call& call) {
  const int64_t tiles = Samples<V>{0, call.samples}.tiles();
  const int parts = int(tiles < call.threads ? tiles : call.threads);
#ifdef FORWARD
  if (parts <= 1) return k_forward<V>(call, {0, call.samples});
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; ++part) k_forward<V>(call, k_part<V>(call, part, parts));
#endif
#ifdef ADJOINT
  for (int k = 0; k < Body::inputs; ++k)
    if (Body::differentiable[k] && Body::shared[k] && !Body::own[k])
      std::memset(call.gradients[k], 0, Body::sizes[k] * sizeof(real));
  if (parts <= 1) return k_adjoint<V>(call, {0, call.samples}, call.gradients);
  int64_t numbers = 0;
  for (int k = 0; k < Body::inputs; ++k) numbers += k_gradient_numbers(call, k);
  std::vector<real> memory((parts - 1) * numbers);  // zeroed
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; ++part) {
    real* gradients[Body::inputs + 1];
    real* free = part ? memory.data() + (part - 1) * numbers : nullptr;
    for (int k = 0; k < Body::inputs; ++k) {
      gradients[k] = part ? free : call.gradients[k];
      if (part) free += k_gradient_numbers(call, k);
    }
    k_adjoint<V>(call, k_part<V>(call, part, parts), gradients);
  }
  for (int part = 1; part < parts; ++part) {
    const real* from = memory.data() + (part - 1) * numbers;
    for (int k = 0; k < Body::inputs; ++k) {
      const int64_t count = k_gradient_numbers(call, k);
      for (int64_t i = 0; i < count; ++i) call.gradients[k][i] += from[i];
      from += count;
    }
  }
#endif
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void run(const Call* call) { k_run<VARYING>(*call); }
