// One chain, block after block.

#ifdef FORWARD
template <class V> static void k_go_through(const Call& call, Samples<V> samples) {
  constexpr int d = Body::dimension;
  const int64_t tiles = samples.tiles();
  std::vector<V> states(tiles * d);
  for (int64_t t = 0; t < tiles; ++t)
    k_read<V>(&states[t * d], call.initial + samples.begin(t) * d, d, samples.count(t));
  const Places<V> places(call, samples);
  Early<V> early(call, samples);
  Inputs<V> in;
  for (int64_t l = 0; l < call.length; ++l) {
    k_locate<V>(call, l, in);
    const int64_t row = call.rows ? call.rows[l] : l;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = samples.begin(t), count = samples.count(t);
      k_fetch<V>(call, l, begin, count, in);
      V next[Body::numbers];
      Body::step<V>(&states[t * d], in.pointers, next, early.of(l, begin));
      for (int i = 0; i < d; ++i) states[t * d + i] = next[i];
      if (call.trajectory && row >= 0) k_write<V>(next, call.trajectory + (row * call.samples + begin) * d, d, count);
      Body::each_result([&](auto number, int k, int offset, int size) ALWAYS_INLINE {
        places.template write<decltype(number)>(l, t, k, next + offset, size);
      });
    }
  }
}


// Results may be wanted with blocks as an inner dimension, as `torch.stack(outputs, 1)` has them. Then rows of samples lie far
// apart, and the memory of each is a stream that advances by a little at every block. Processors look ahead of some streams
// only, and those of a power of two's distance share the few places of one cache set. A store with three fluxes, 32 samples of 16
// numbers, takes half the time so.
constexpr int64_t k_far = 4096, k_streams = 16;

// Streams that a tile writes, and to `bytes` what a block does.
template <class V> static int64_t k_streams_of(const Call& call, int64_t& bytes) {
  int64_t streams = 0;
  Body::each_result([&](auto number, int k, int, int size) ALWAYS_INLINE {
    const Result& result = call.results[k];
    if (!result.base || !result.in_row || result.row < k_far) return;
    streams += (k_width<V> + result.in_row - 1) / result.in_row;
    bytes += call.samples * size * int64_t(sizeof(number));
  });
  return streams;
}

// All blocks for some samples, then for the next, where that makes fewer streams and what is read anew for each is little.
template <class V> static void k_forward(const Call& call, Samples<V> samples) {
  int64_t bytes = 0, read = 0;
  const int64_t streams = k_streams_of<V>(call, bytes);
  const int64_t some = streams ? std::max<int64_t>(1, k_streams / streams) * k_width<V> : samples.last - samples.first;
  for (int k = 0; k < Body::inputs; ++k)
    if (!Body::own[k] && !Body::shared[k]) read += Body::sizes[k] * int64_t(sizeof(real));
  if (read * (samples.last - samples.first) > bytes * some) return k_go_through<V>(call, samples);
  for (int64_t first = samples.first; first < samples.last; first += some)
    k_go_through<V>(call, {first, std::min(first + some, samples.last)});
}
#endif

#ifdef ADJOINT
// Numbers of per-block gradients that each thread sums before those of all threads are added: they stay in a near cache.
constexpr int64_t k_together = 1 << 15;

// Whether the factors of a gradient are kept, to be multiplied later.
constexpr bool k_factored(int k) { return Body::rows[k] > 0; }
constexpr bool k_summed(int k) { return Body::differentiable[k] && !Body::own[k]; }
// Whether a gradient is summed as whole vectors, whose lanes are added in the end.
template <class V> constexpr bool k_in_lanes(int k) { return k_is_vector<V> && k_summed(k) && !Body::matrix[k]; }

// One thread's samples, from the last block to the first.
template <class V> struct Adjoint {
  const Call& call;
  const Samples<V> samples;
  const Places<V> places;
  Early<V> early;
  // Of the state of each tile, and behind it the cotangents of its outputs.
  std::vector<V> adjoints;
  // Sums over samples of what k_in_lanes tells: of a block, and of all blocks where they share an input.
  std::vector<V> sums, kept;
  // `kept` before a tile that samples do not fill.
  std::vector<V> before;
  std::vector<Factors> factors;
  // Where gradients are summed. What blocks share is zero at first; what they do not is set to zero at each block,
  // unless the body begins these sums itself.
  real* gradients[Body::inputs + 1];

  Adjoint(const Call& call, Samples<V> samples)
      : call(call), samples(samples), places(call, samples), early(call, samples),
        adjoints(samples.tiles() * Body::numbers, V{}),
        sums(k_is_vector<V> ? Body::summed_numbers + 1 : 1, V{}), kept(k_is_vector<V> ? Body::kept_numbers + 1 : 1, V{}),
        before(kept.size()) {
    const int64_t pairs = call.length * samples.tiles() * k_width<V>;
    for (int k = 0; k < Body::inputs; ++k) factors.emplace_back(Body::rows[k], Body::columns[k], pairs);
  }

  // Blocks `last` - 1 to `first`; memory for gradients of blocks begins with that of block `origin`.
  void sweep(int64_t last, int64_t first, int64_t origin) {
    constexpr int d = Body::dimension;
    const int64_t tiles = samples.tiles();
    Inputs<V> in;
    V own[Body::own_numbers + 1];
    for (int64_t l = last - 1; l >= first; --l) {
      k_locate<V>(call, l, in);
      void* out[Body::inputs + 1] = {};
      {
        V* sum = sums.data();
        V* keep = kept.data();
        V* mine = own;
        UNROLL for (int k = 0; k < Body::inputs; ++k) {
          if (!Body::differentiable[k]) continue;
          const int size = Body::sizes[k];
          if (k_factored(k)) {
            factors[k].out = gradients[k];
            out[k] = &factors[k];
          } else if (Body::own[k]) {
            out[k] = mine;
            mine += size;
          } else if (k_in_lanes<V>(k)) {
            V*& next = Body::shared[k] ? keep : sum;
            if (!Body::shared[k]) std::fill_n(next, size, V{});
            out[k] = next;
            next += size;
          } else {
            real* place = gradients[k] + (Body::shared[k] ? 0 : (l - origin) * size);
            if (!Body::shared[k] && !(k_alone && Body::begun[k])) std::fill_n(place, size, real(0));
            out[k] = place;
          }
        }
      }
      const real* cotangent = call.cotangents.at(l);
      // The last tile comes first. It may have lanes without a sample, whose share of the sums is taken out again.
      for (int64_t t = tiles - 1; t >= 0; --t) {
        const int64_t begin = samples.begin(t), count = samples.count(t);
        const real* previous = l ? call.trajectory + (l - 1) * call.samples * d : call.initial;
        V state[d], next[Body::numbers], *adjoint = &adjoints[t * Body::numbers];
        k_read<V>(state, previous + begin * d, d, count);
        k_fetch<V>(call, l, begin, count, in);
        if (cotangent) {
          k_read<V>(next, cotangent + begin * d, d, count);
          for (int i = 0; i < d; ++i) adjoint[i] = adjoint[i] + next[i];
        }
        Body::each_result([&](auto number, int k, int offset, int size) ALWAYS_INLINE {
          if constexpr (std::is_same_v<decltype(number), real>) {
            const bool given = places.read(l, t, k, next + offset, size);
            if (offset >= d) std::fill_n(adjoint + offset, size, V{});  // an output has no blocks behind that read it
            for (int i = offset; given && i < offset + size; ++i) adjoint[i] = adjoint[i] + next[i];
          }
        });
        const bool partial = k_is_vector<V> && count < k_width<V>;
        if (partial) before = kept;
        Body::pullback<V>(state, in.pointers, early.of(l, begin), adjoint, next, out, count);
        for (int i = 0; i < d; ++i) adjoint[i] = next[i];
        if constexpr (k_is_vector<V>) {
          if (partial) {
            // Vectors are set as a whole, since GCC 12 takes the address of a lane for that of a vector, and stores as if
            // it were aligned.
            const ivec wanted = k_first_lanes(count);
            for (int i = 0; i < Body::summed_numbers; ++i) sums[i] = k_select(wanted, sums[i], V{});
            for (int i = 0; i < Body::kept_numbers; ++i) kept[i] = k_select(wanted, kept[i], before[i]);
          }
        }
        for (int k = 0; k < Body::inputs; ++k) {
          if (!Body::own[k] || !Body::differentiable[k]) continue;
          const int64_t row = (Body::shared[k] ? 0 : l * call.samples) + begin;
          real* rows = call.gradients[k] + row * Body::sizes[k];
          V* mine = static_cast<V*>(out[k]);
          if (Body::shared[k] && l < call.length - 1) {  // add the blocks behind this one
            V total[Body::sizes[k] + 1];
            k_read<V>(total, rows, Body::sizes[k], count);
            for (int i = 0; i < Body::sizes[k]; ++i) mine[i] = mine[i] + total[i];
          }
          k_write<V>(mine, rows, Body::sizes[k], count);
        }
      }
      if constexpr (k_is_vector<V>) {
        for (int k = 0; k < Body::inputs; ++k)
          if (k_in_lanes<V>(k) && !Body::shared[k])
            for (int i = 0; i < Body::sizes[k]; ++i) {
              real total = 0;
              for (int w = 0; w < k_lanes; ++w) total += static_cast<V*>(out[k])[i][w];
              gradients[k][(l - origin) * Body::sizes[k] + i] = total;
            }
      }
    }
  }

  // Writes what is only known after the first block.
  void finish() {
    for (Factors& kept : factors) kept.finish();
    if constexpr (k_is_vector<V>) {
      int used = 0;
      for (int k = 0; k < Body::inputs; ++k)
        if (k_in_lanes<V>(k) && Body::shared[k])
          for (int i = 0; i < Body::sizes[k]; ++i, ++used) {
            real total = 0;
            for (int w = 0; w < k_lanes; ++w) total += kept[used][w];
            gradients[k][i] += total;
          }
    }
    for (int64_t t = 0; t < samples.tiles(); ++t)
      k_write<V>(&adjoints[t * Body::numbers], call.d_initial + samples.begin(t) * Body::dimension, Body::dimension, samples.count(t));
  }
};
#endif

template <class V> static Samples<V> k_part(const Call& call, int64_t part, int64_t parts) {
  const int64_t tiles = Samples<V>{0, call.samples}.tiles();
  const int64_t first = tiles * part / parts * k_width<V>, last = tiles * (part + 1) / parts * k_width<V>;
  return {first, last < call.samples ? last : call.samples};
}

#ifdef ADJOINT
// Threads share the samples. The first sums gradients where they belong, and each other one in memory for a few blocks at a
// time, after which it is added. Memory for all blocks would be as large as the result, for each thread.
template <class V> static void k_adjoint(const Call& call, int parts) {
  int64_t block = 0, kept = 0;
  for (int k = 0; k < Body::inputs; ++k)
    if (k_summed(k)) (Body::shared[k] ? kept : block) += Body::sizes[k];
  int64_t together = block ? k_together / block : call.length;
  together = together < 1 ? 1 : together < call.length ? together : call.length;
  std::vector<real> memory((parts - 1) * (kept + together * block));  // zeroed
  std::deque<Adjoint<V>> threads;
  real* free = memory.data();
  for (int part = 0; part < parts; ++part) {
    threads.emplace_back(call, k_part<V>(call, part, parts));
    for (int k = 0; k < Body::inputs; ++k) {
      threads[part].gradients[k] = part ? free : call.gradients[k];
      if (part && k_summed(k)) free += (Body::shared[k] ? 1 : together) * Body::sizes[k];
    }
  }
#pragma omp parallel num_threads(parts)
  for (int64_t last = call.length; last > 0; last -= together) {
    const int64_t first = last > together ? last - together : 0;
#pragma omp for schedule(static, 1)
    for (int part = 0; part < parts; ++part) threads[part].sweep(last, first, part ? first : 0);
    for (int k = 0; k < Body::inputs; ++k) {
      if (!k_summed(k) || Body::shared[k]) continue;
      const int64_t size = Body::sizes[k];
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < (last - first) * size; ++i)
        for (int part = 1; part < parts; ++part) call.gradients[k][first * size + i] += threads[part].gradients[k][i];
    }
#pragma omp barrier
  }
  for (int part = 0; part < parts; ++part) {
    threads[part].finish();
    for (int k = 0; k < Body::inputs; ++k)
      if (part && k_summed(k) && Body::shared[k])
        for (int i = 0; i < Body::sizes[k]; ++i) call.gradients[k][i] += threads[part].gradients[k][i];
  }
}
#endif

template <class V> static void k_solve(const Call& call) {
  const int64_t tiles = Samples<V>{0, call.samples}.tiles();
  const int parts = int(tiles < call.threads ? tiles : call.threads);
#ifdef FORWARD
  if (parts <= 1) return k_forward<V>(call, {0, call.samples});
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int part = 0; part < parts; ++part) k_forward<V>(call, k_part<V>(call, part, parts));
#endif
#ifdef ADJOINT
  for (int k = 0; k < Body::inputs; ++k)
    if (k_summed(k) && Body::shared[k]) std::memset(call.gradients[k], 0, Body::sizes[k] * sizeof(real));
  if (parts > 1) return k_adjoint<V>(call, parts);
  Adjoint<V> all(call, {0, call.samples});
  std::memcpy(all.gradients, call.gradients, sizeof call.gradients);
  all.sweep(call.length, 0, 0);
  all.finish();
#endif
}

static void k_run(const Call& call) { k_solve<VARYING>(call); }
