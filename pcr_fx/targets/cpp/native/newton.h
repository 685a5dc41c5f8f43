// Newton's method on one chain after another, each by itself. When it ends is explained in pcr_fx/stopping.py, whose
// outcomes and constants are printed in front of this.
//
// The linear systems delta_l = J_l delta_{l-1} + r_l are solved in parts, one for each thread. A part's blocks are composed
// into one affine map, delta at the ends of parts is found from these maps, and each part is substituted from its first
// block on. That is a hybrid of reduction and forward substitution. With one part, and so wherever samples keep all threads
// busy, it is substitution alone.

// The larger one; NaN if either is.
INLINE double k_larger(double a, double b) { return b > a || b != b ? b : a; }

class Newton {
 public:
  static constexpr int d = Body::dimension;
  Newton(const Call& call, int64_t parts)
      : call(call), parts(parts), length(call.length), states((length + 1) * d), residuals(length * d),
        jacobians(length * d * d), maps(parts * d * d), ends((parts + 1) * d) {}

  int outcome, iterations;
  double residual;

  void solve(int64_t which) {
    sample = which;
    for (int64_t l = 0; l <= length; ++l) std::memcpy(&states[l * d], call.initial + sample * d, d * sizeof(real));
    outcome = iterate();
    for (int64_t l = 0; l < length; ++l)
      std::memcpy(call.trajectory + (l * call.samples + sample) * d, &states[(l + 1) * d], d * sizeof(real));
  }

 private:
  const Call& call;
  const int64_t parts, length;
  int64_t sample;
  std::vector<real> states, residuals;  // [L + 1, d], [L, d]
  std::vector<real> jacobians;          // [L, d, d], columns together
  std::vector<real> maps, ends;         // of each part, and where it starts: [P, d, d], [P + 1, d]

  int iterate() {
    const double tolerance = call.iteration[0];
    const int limit = int(call.iteration[1]);
    double best = INFINITY;
    int best_at = 0;
    residual = INFINITY;
    for (iterations = 0;; ++iterations) {
      const double last = residual;
      // Newton squares its error. This is most likely the solution, whose Jacobians nobody needs.
      const bool expected = last * last < tolerance;
      residual = evaluate(!expected);
      if (residual <= tolerance) return CONVERGED;
      if (!std::isfinite(residual)) return NON_FINITE;
      if (expected) evaluate(true);
      const bool stalled = residual > k_stalled * last;
      if (expected || stalled) {
        const double against_terms = measure(true);
        const bool rounding = stalled && against_terms <= k_rounding_level;
        if (against_terms <= tolerance || rounding) {
          residual = against_terms;
          return against_terms <= tolerance ? CONVERGED : ROUNDING;
        }
      }
      if (residual <= k_progress * best) best = residual, best_at = iterations;
      if (iterations == limit) return ITERATION_LIMIT;
      if (iterations - best_at >= k_patience) return STAGNATED;
      correct();
    }
  }

  template <class F> void in_parts(F f) {
    if (parts == 1) return f(0);
#pragma omp parallel for num_threads(int(parts)) schedule(static, 1)
    for (int64_t p = 0; p < parts; ++p) f(p);
  }
  int64_t begin(int64_t part) const { return length * part / parts; }

  // All residuals, and with `linearise` all Jacobians; the largest relative residual.
  double evaluate(bool linearise) {
    in_parts([&](int64_t part) {
      Inputs<real> in;
      for (int64_t l = begin(part); l < begin(part + 1); ++l) {
        k_locate<real>(call, l, in);
        k_fetch<real>(call, l, sample, 1, in);
        real value[d];
        Body::step<real>(&states[l * d], in.pointers, value);
        for (int i = 0; i < d; ++i) residuals[l * d + i] = value[i] - states[(l + 1) * d + i];
        if (linearise) find_jacobian(l);
      }
    });
    return measure(false);
  }

  // Pulls back as many unit vectors at a time as a vector has lanes; each lane gets a row of the Jacobian.
  void find_jacobian(int64_t l) {
    Inputs<vec> in;
    k_locate<vec>(call, l, in);
    k_fetch<vec>(call, l, sample, 1, in);
    vec state[d], unit[d], row[d];
    k_read<vec>(state, &states[l * d], d, 1);
    for (int first = 0; first < d; first += k_lanes) {
      const int count = d - first < k_lanes ? d - first : k_lanes;
      for (int i = 0; i < d; ++i)
        for (int w = 0; w < k_lanes; ++w) unit[i][w] = i == first + w;
      Body::pull<vec>(state, in.pointers, unit, row);
      for (int i = 0; i < d; ++i)
        for (int w = 0; w < count; ++w) jacobians[(l * d + i) * d + first + w] = row[i][w];
    }
  }

  // The largest residual, relative to the size of what its block computes, or, with `terms`, of the terms of that.
  double measure(bool terms) {
    std::vector<double> largest(parts);
    in_parts([&](int64_t part) {
      double worst = 0;
      for (int64_t l = begin(part); l < begin(part + 1); ++l) {
        int start = 0;
        for (int k = 0; k < Body::carried; ++k) {
          double size = 0, residual = 0;
          for (int i = start; i < start + Body::counts[k]; ++i) {
            real term = std::abs(states[(l + 1) * d + i]);
            if (terms) {
              for (int j = 0; j < d; ++j) term += std::abs(jacobians[(l * d + j) * d + i]) * std::abs(states[l * d + j]);
              if (std::isinf(term)) term = NAN;  // nothing is small because a product overflowed
            }
            size = k_larger(size, term);
            residual = k_larger(residual, std::abs(residuals[l * d + i]));
          }
          if (Body::counts[k]) worst = k_larger(worst, residual / (size < k_smallest_scale ? k_smallest_scale : size));
          start += Body::counts[k];
        }
      }
      largest[part] = worst;
    });
    double worst = 0;
    for (double one : largest) worst = k_larger(worst, one);
    return worst;
  }

  // y = J x + b. `y` may be neither.
  static INLINE_MEMBER void affine(const real* RESTRICT jacobian, const real* RESTRICT x, const real* b, real* RESTRICT y) {
    for (int i = 0; i < d; ++i) y[i] = b ? b[i] : real(0);
    for (int j = 0; j < d; ++j)
      for (int i = 0; i < d; ++i) y[i] += jacobian[j * d + i] * x[j];
  }

  // Solve for the correction, and add it.
  void correct() {
    if (parts > 1) in_parts([&](int64_t part) { compose(part); });
    for (int i = 0; i < d; ++i) ends[i] = 0;
    for (int64_t part = 1; part < parts; ++part) {
      real offset[d];
      std::memcpy(offset, &ends[part * d], sizeof offset);
      affine(&maps[(part - 1) * d * d], &ends[(part - 1) * d], offset, &ends[part * d]);
    }
    in_parts([&](int64_t part) {
      real before[d], delta[d];
      std::memcpy(before, &ends[part * d], sizeof before);
      for (int64_t l = begin(part); l < begin(part + 1); ++l) {
        affine(&jacobians[l * d * d], before, &residuals[l * d], delta);
        for (int i = 0; i < d; ++i) states[(l + 1) * d + i] += before[i] = delta[i];
      }
    });
  }

  // The map and offset of all blocks of a part. Nothing comes before the first part, so that only its offset is needed,
  // and nothing after the last.
  void compose(int64_t part) {
    if (part == parts - 1) return;
    real offset[d] = {}, next[d];
    std::vector<real> map(d * d), product(d * d);
    for (int i = 0; i < d; ++i) map[i * d + i] = 1;
    for (int64_t l = begin(part); l < begin(part + 1); ++l) {
      const real* jacobian = &jacobians[l * d * d];
      affine(jacobian, offset, &residuals[l * d], next);
      std::memcpy(offset, next, sizeof offset);
      if (part == 0) continue;
      for (int j = 0; j < d; ++j) affine(jacobian, &map[j * d], nullptr, &product[j * d]);
      map.swap(product);
    }
    std::memcpy(&ends[(part + 1) * d], offset, sizeof offset);
    std::memcpy(&maps[part * d * d], map.data(), d * d * sizeof(real));
  }
};

static void k_run(const Call& call) {
  const int64_t team = call.samples < call.threads ? call.samples : call.threads;
  int outcome = CONVERGED, iterations = 0;
  double residual = 0;
  bool failed = false;
#pragma omp parallel num_threads(int(team)) if (team > 1)
  {
    // Where there are fewer samples than threads, threads share the blocks of a sample.
    const int64_t share = team > 1 ? 1 : call.threads, half = call.length / 2 > 1 ? call.length / 2 : 1;
    Newton newton(call, share < half ? share : half);
#pragma omp for schedule(dynamic)
    for (int64_t sample = 0; sample < call.samples; ++sample) {
      bool stop;
#pragma omp atomic read
      stop = failed;
      if (stop) continue;
      newton.solve(sample);
#pragma omp critical
      {
        const bool fails = newton.outcome > ROUNDING;
        // A failure speaks for the whole call.
        if (!failed) {
          outcome = fails || newton.outcome > outcome ? newton.outcome : outcome;
          iterations = fails || newton.iterations > iterations ? newton.iterations : iterations;
          residual = fails ? newton.residual : k_larger(residual, newton.residual);
        }
        if (fails) {
#pragma omp atomic write
          failed = true;
        }
      }
    }
  }
  call.iteration[2] = iterations;
  call.iteration[3] = residual;
  call.iteration[4] = outcome;
}
