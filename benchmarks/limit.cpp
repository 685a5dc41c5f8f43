// The limit line of benchmarks/kernels.py: x + 0.1 (W2 tanh(W1 x + b1) + b2), written by hand for one width W.
// Parameters lie in columns [L, ...]; samples of a batch in blocks of 16, a vector each, as a specialist would choose.
#include <cmath>
#include <cstdint>
#include <vector>

constexpr int N = SAMPLES == 1 ? 1 : 16;  // samples computed together
typedef float real;

static inline real fast_tanh(real x) {
  // A continued fraction: short, and right to a few ulp.
  x = x > 9.f ? 9.f : (x < -9.f ? -9.f : x);
  const real s = x * x;
  const real p = x * (2027025.f + s * (270270.f + s * (6930.f + s * 36.f)));
  const real q = 2027025.f + s * (945945.f + s * (51975.f + s * (630.f + s)));
  const real t = p / q;
  return t > 1.f ? 1.f : (t < -1.f ? -1.f : t);
}

static void block(const real* w1, const real* b1, const real* w2, const real* b2, const real* x, real* h, real* y) {
  for (int i = 0; i < W; ++i) {
    real sum[N];
    for (int n = 0; n < N; ++n) sum[n] = b1[i];
    for (int k = 0; k < W; ++k)
      for (int n = 0; n < N; ++n) sum[n] += w1[i * W + k] * x[k * N + n];
    for (int n = 0; n < N; ++n) h[i * N + n] = fast_tanh(sum[n]);
  }
  for (int i = 0; i < W; ++i) {
    real sum[N];
    for (int n = 0; n < N; ++n) sum[n] = b2[i];
    for (int k = 0; k < W; ++k)
      for (int n = 0; n < N; ++n) sum[n] += w2[i * W + k] * h[k * N + n];
    for (int n = 0; n < N; ++n) y[i * N + n] = x[i * N + n] + 0.1f * sum[n];
  }
}

// x, states: [tiles][W][N]; states and hidden: [L][tiles][W][N].
extern "C" void forward(int64_t L, const real* w1, const real* b1, const real* w2, const real* b2, const real* x,
                        real* states, real* hidden) {
  constexpr int tiles = SAMPLES / N, size = W * N;
#pragma omp parallel for num_threads(THREADS) schedule(static, 1)
  for (int t = 0; t < tiles; ++t)
    for (int64_t l = 0; l < L; ++l)
      block(w1 + l * W * W, b1 + l * W, w2 + l * W * W, b2 + l * W,
            l ? states + ((l - 1) * tiles + t) * size : x + t * size, hidden + (l * tiles + t) * size,
            states + (l * tiles + t) * size);
}

// The gradients of the sum of the last states; g1, ...: like w1, ...; THREADS times over, added up at the end.
extern "C" void backward(int64_t L, const real* w1, const real* w2, const real* x, const real* states,
                         const real* hidden, real* gw1, real* gb1, real* gw2, real* gb2, real* dx) {
  constexpr int tiles = SAMPLES / N, size = W * N;
  std::vector<real> more(THREADS > 1 ? L * (2 * W * W + 2 * W) : 0);
#pragma omp parallel for num_threads(THREADS) schedule(static, 1)
  for (int part = 0; part < THREADS; ++part) {
    real* d = part ? more.data() : nullptr;
    real *g1 = part ? d : gw1, *c1 = part ? d + L * W * W : gb1;
    real *g2 = part ? d + L * (W * W + W) : gw2, *c2 = part ? d + L * (2 * W * W + W) : gb2;
    const int first = tiles * part / THREADS, last = tiles * (part + 1) / THREADS;
    std::vector<real> adjoints((last - first) * size + 1, 1.f);
    for (int64_t l = L - 1; l >= 0; --l) {
      const real *a = w1 + l * W * W, *b = w2 + l * W * W;
      for (int i = 0; i < W * W; ++i) g1[l * W * W + i] = g2[l * W * W + i] = 0;
      for (int i = 0; i < W; ++i) c1[l * W + i] = c2[l * W + i] = 0;
      for (int t = first; t < last; ++t) {
        real* g = &adjoints[(t - first) * size];
        const real* z = l ? states + ((l - 1) * tiles + t) * size : x + t * size;
        const real* h = hidden + (l * tiles + t) * size;
        real e[size], dh[size] = {};
        for (int i = 0; i < size; ++i) e[i] = 0.1f * g[i];
        for (int i = 0; i < W; ++i)
          for (int k = 0; k < W; ++k) {
            real sum = 0;
            for (int n = 0; n < N; ++n) {
              sum += e[i * N + n] * h[k * N + n];
              dh[k * N + n] += b[i * W + k] * e[i * N + n];
            }
            g2[l * W * W + i * W + k] += sum;
          }
        for (int i = 0; i < size; ++i) dh[i] *= 1.f - h[i] * h[i];
        for (int i = 0; i < W; ++i)
          for (int k = 0; k < W; ++k) {
            real sum = 0;
            for (int n = 0; n < N; ++n) {
              sum += dh[i * N + n] * z[k * N + n];
              g[k * N + n] += a[i * W + k] * dh[i * N + n];
            }
            g1[l * W * W + i * W + k] += sum;
          }
        for (int i = 0; i < W; ++i)
          for (int n = 0; n < N; ++n) {
            c1[l * W + i] += dh[i * N + n];
            c2[l * W + i] += e[i * N + n];
          }
      }
    }
    for (int i = 0; i < (last - first) * size; ++i) dx[first * size + i] = adjoints[i];
  }
  if (THREADS > 1) {
    const real* d = more.data();
    for (int64_t i = 0; i < L * W * W; ++i) gw1[i] += d[i], gw2[i] += d[L * (W * W + W) + i];
    for (int64_t i = 0; i < L * W; ++i) gb1[i] += d[L * W * W + i], gb2[i] += d[L * (2 * W * W + W) + i];
  }
}
