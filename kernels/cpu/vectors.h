// Vectors of floats as wide as the machine has them, in GCC's and Clang's portable notation.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct BFloat16 {
  uint16_t bits;
};

template <typename Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// The first bytes of it; zeros after them.
template <typename Vector>
inline Vector load_some(const void* from, int64_t num_bytes) {
  Vector vector{};
  std::memcpy(&vector, from, num_bytes);
  return vector;
}

template <typename Vector>
inline void store(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// Less zero, which compilers leave out; plus zero they do not, for -0 would become 0.
inline Floats splat(float value) { return value - Floats{}; }

inline Floats as_floats(Words words) { return reinterpret_cast<Floats>(words); }

inline Floats load_floats(const float* from) { return load<Floats>(from); }

// Compilers make five instructions of __builtin_convertvector here where the machine has one.
inline Words widen(Halves halves) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)));
#else
  return __builtin_convertvector(halves, Words);
#endif
}

// A bfloat16 is the upper half of the float of the same value.
inline Floats load_floats(const BFloat16* from) {
  return as_floats(widen(load<Halves>(from)) << 16);
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

inline void store_floats(float* to, Floats vector) { store(to, vector); }

// The upper halves of the nearest bfloat16 values, ties to even; NaN stays NaN.
inline Words narrowed(Floats vector) {
  const Words words = reinterpret_cast<const Words&>(vector);
  const Words rounded = words + 0x7FFF + ((words >> 16) & 1);
  const Words nan = reinterpret_cast<const Words&>(static_cast<const Ints&>(vector != vector));
  return ((rounded & ~nan) | ((words | 0x400000) & nan)) >> 16;
}

inline void store_floats(BFloat16* to, Floats vector) {
  store(to, __builtin_convertvector(narrowed(vector), Halves));
}

// What a Value of it would be.
template <typename Value>
inline Floats rounded(Floats vector) {
  if constexpr (sizeof(Value) == 2)
    return as_floats(narrowed(vector) << 16);
  else
    return vector;
}

// Two bfloat16 values a lane: their products are added to the lane's float, in one instruction where
// the machine has it.
#if defined(__AVX512BF16__)
constexpr bool kHasPairProducts = true;
inline Floats add_products(Floats sums, Words a, Words b) {
  return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#else
constexpr bool kHasPairProducts = false;
inline Floats add_products(Floats sums, Words a, Words b) {
  sums += as_floats(a << 16) * as_floats(b << 16);
  return sums + as_floats(a & 0xFFFF0000u) * as_floats(b & 0xFFFF0000u);
}
#endif

inline Floats select(Ints condition, Floats yes, Floats no) { return condition ? yes : no; }

inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return select(a > b, a, b);
#endif
}

inline bool any_above(Floats vector, float bound) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(vector, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(vector, _mm256_set1_ps(bound), _CMP_GT_OQ)) != 0;
#else
  for (int lane = 0; lane < kLanes; ++lane)
    if (vector[lane] > bound) return true;
  return false;
#endif
}

// Lane i and lane i ^ width change places.
template <int width, int... lanes>
inline Floats swapped(Floats vector, std::integer_sequence<int, lanes...>) {
  constexpr Ints from = {(lanes ^ width)...};
  return __builtin_shuffle(vector, from);
}

// One value of all lanes, folded by halves.
template <int width = kLanes / 2, typename Fold>
inline float fold(Floats vector, Fold combine) {
  if constexpr (width > 0) {
    const auto lanes = std::make_integer_sequence<int, kLanes>{};
    return fold<width / 2>(combine(vector, swapped<width>(vector, lanes)), combine);
  } else {
    return vector[0];
  }
}

inline float largest(Floats vector) { return fold(vector, larger); }

inline float sum(Floats vector) {
  return fold(vector, [](Floats a, Floats b) { return a + b; });
}

// e^x for x of at most 80, within 2 ulp; 0 below -87.
inline Floats bounded_exp(Floats x) {
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints exponent = (reinterpret_cast<const Ints&>(shifted) << 23) +
                        reinterpret_cast<const Ints&>(p);
  return select(x > -87.0f, reinterpret_cast<const Floats&>(exponent), Floats{});
}

#if defined(__AVX512F__)

// rows[i][j] becomes rows[j][i]: pairs of words, then of pairs, then of quarters and halves.
inline void transpose(Words rows[kLanes]) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    const __m512i even = reinterpret_cast<__m512i>(rows[i]);
    const __m512i odd = reinterpret_cast<__m512i>(rows[i + 1]);
    a[i] = _mm512_unpacklo_epi32(even, odd);
    a[i + 1] = _mm512_unpackhi_epi32(even, odd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  constexpr int kEven = 0x88, kOdd = 0xDD;  // quarters 0 and 2, 1 and 3, of each
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
    for (int j = i; j < i + 4; ++j) {
      a[j] = _mm512_shuffle_i32x4(b[j], b[j + 4], kEven);
      a[j + 4] = _mm512_shuffle_i32x4(b[j], b[j + 4], kOdd);
    }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    rows[i] = reinterpret_cast<Words>(_mm512_shuffle_i32x4(a[i], a[i + 8], kEven));
    rows[i + 8] = reinterpret_cast<Words>(_mm512_shuffle_i32x4(a[i], a[i + 8], kOdd));
  }
}

#else

// Lane by lane of two vectors: where blocks of `width` lanes change places with their neighbours.
template <int width, int... lanes>
inline void exchange(Words& a, Words& b, std::integer_sequence<int, lanes...>) {
  constexpr Ints lower = {(lanes & width ? kLanes + lanes - width : lanes)...};
  constexpr Ints upper = {(lanes & width ? kLanes + lanes : lanes + width)...};
  const Words first = a, second = b;
  a = __builtin_shuffle(first, second, lower);
  b = __builtin_shuffle(first, second, upper);
}

// rows[i][j] becomes rows[j][i], in log2(kLanes) rounds.
template <int width = 1>
inline void transpose(Words rows[kLanes]) {
  if constexpr (width < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & width))
        exchange<width>(rows[i], rows[i + width], std::make_integer_sequence<int, kLanes>{});
    transpose<2 * width>(rows);
  }
}

#endif
