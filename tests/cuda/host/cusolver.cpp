// In the place of cuSOLVER: its routines for a part of the eigenpairs and for those of many matrices, with the arguments
// that its manual lists, over memory of the host, by Jacobi's rotations.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

extern "C" {
int failure = 0; // what a call leaves as its info, of many matrices as that of the last one
int status = 0;  // what it returns
}

static const size_t DEVICE_BYTES = 4096, HOST_BYTES = 128;

template <class Real> static void solve(Real* a, int64_t n, int64_t first, int64_t last, Real* w) {
    std::vector<double> m(n * n), v(n * n);
    for (int64_t i = 0; i < n; ++i) v[i * n + i] = 1;
    for (int64_t column = 0; column < n; ++column) // the upper triangle, columns one after the other
        for (int64_t row = 0; row <= column; ++row) m[row * n + column] = m[column * n + row] = a[column * n + row];
    for (int sweep = 0; sweep < 30; ++sweep)
        for (int64_t p = 0; p < n; ++p)
            for (int64_t q = p + 1; q < n; ++q) {
                if (std::abs(m[p * n + q]) < 1e-300) continue;
                const double theta = (m[q * n + q] - m[p * n + p]) / (2 * m[p * n + q]);
                const double t = (theta < 0 ? -1 : 1) / (std::abs(theta) + std::sqrt(theta * theta + 1));
                const double c = 1 / std::sqrt(t * t + 1), s = t * c;
                for (int64_t k = 0; k < n; ++k) {
                    const double x = m[k * n + p], y = m[k * n + q];
                    m[k * n + p] = c * x - s * y, m[k * n + q] = s * x + c * y;
                }
                for (int64_t k = 0; k < n; ++k) {
                    const double x = m[p * n + k], y = m[q * n + k], u = v[k * n + p], z = v[k * n + q];
                    m[p * n + k] = c * x - s * y, m[q * n + k] = s * x + c * y;
                    v[k * n + p] = c * u - s * z, v[k * n + q] = s * u + c * z;
                }
            }
    std::vector<int64_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return m[i * n + i] < m[j * n + j]; });
    for (int64_t i = first; i <= last; ++i) {
        w[i - first] = (Real)m[order[i] * n + order[i]];
        for (int64_t k = 0; k < n; ++k) a[(i - first) * n + k] = (Real)v[k * n + order[i]];
    }
}

#define ASKED                                                                                                          \
    void *handle, void *params, int jobz, int range, int uplo, int64_t n, int kind_of_a, void *a, int64_t lda, void *, \
        void *, int64_t first, int64_t last, int64_t *found, int kind_of_w, void *w, int compute
#define REFUSED                                                                                                        \
    (!handle || !params || jobz != 1 || range != 1002 || uplo != 1 || lda != n || kind_of_a != kind_of_w ||            \
     kind_of_a != compute || kind_of_a > 1 || !a || !w || !found || first < 1 || last < first || last > n)

extern "C" int cusolverDnXsyevdx_bufferSize(ASKED, size_t* on_device, size_t* on_host) {
    if (REFUSED) return 3; // CUSOLVER_STATUS_INVALID_VALUE
    *on_device = DEVICE_BYTES, *on_host = HOST_BYTES;
    return 0;
}

extern "C" int cusolverDnXsyevdx(ASKED, void* device, size_t on_device, void* host, size_t on_host, int* info) {
    if (REFUSED || on_device != DEVICE_BYTES || on_host != HOST_BYTES || !info) return 3;
    memset(device, 7, on_device), memset(host, 7, on_host);
    if (kind_of_a) solve((double*)a, n, first - 1, last - 1, (double*)w);
    else solve((float*)a, n, first - 1, last - 1, (float*)w);
    *found = last - first + 1;
    *info = failure;
    return status;
}

#define ALL_ASKED                                                                                                      \
    void *handle, void *params, int jobz, int uplo, int64_t n, int kind_of_a, void *a, int64_t lda, int kind_of_w,     \
        void *w, int compute
#define ALL_REFUSED                                                                                                    \
    (!handle || !params || jobz < 0 || jobz > 1 || uplo != 1 || lda != n || kind_of_a != kind_of_w ||                  \
     kind_of_a != compute || kind_of_a > 1 || !a || !w || batch < 1)

extern "C" int cusolverDnXsyevBatched_bufferSize(ALL_ASKED, size_t* on_device, size_t* on_host, int64_t batch) {
    if (ALL_REFUSED) return 3;
    *on_device = batch * DEVICE_BYTES, *on_host = HOST_BYTES;
    return 0;
}

template <class Real> static void solve_each(Real* a, int64_t n, Real* w, int64_t batch, bool vectors) {
    for (int64_t k = 0; k < batch; ++k, a += n * n, w += n) {
        solve(a, n, 0, n - 1, w);
        if (!vectors) std::fill(a, a + n * n, (Real)7); // whatever is left there
    }
}

extern "C" int cusolverDnXsyevBatched(ALL_ASKED, void* device, size_t on_device, void* host, size_t on_host, int* info,
                                      int64_t batch) {
    if (ALL_REFUSED || on_device != batch * DEVICE_BYTES || on_host != HOST_BYTES || !info) return 3;
    memset(device, 7, on_device), memset(host, 7, on_host);
    if (kind_of_a) solve_each((double*)a, n, (double*)w, batch, jobz);
    else solve_each((float*)a, n, (float*)w, batch, jobz);
    std::fill(info, info + batch, 0);
    info[batch - 1] = failure;
    return status;
}
