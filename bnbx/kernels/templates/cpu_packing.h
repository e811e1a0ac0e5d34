// Codes in bytes of their own to codes packed without gaps, the first in the highest bits, and back.

// As many at a time as fill whole bytes.
template <int BITS>
struct Group {
  static constexpr int CODES = 8 % BITS ? 8 : 8 / BITS, BYTES = CODES * BITS / 8;
};

template <int BITS>
static inline void unpack_group(const u8* packed, u8* codes) {
  unsigned long long word = 0;
  for (int i = 0; i < Group<BITS>::BYTES; ++i) word = word << 8 | packed[i];
  for (int i = 0; i < Group<BITS>::CODES; ++i)
    codes[i] = (u8)((word >> (BITS * (Group<BITS>::CODES - 1 - i))) & ((1 << BITS) - 1));
}

template <int BITS>
static inline void pack_group(const u8* codes, u8* packed) {
  unsigned long long word = 0;
  for (int i = 0; i < Group<BITS>::CODES; ++i) word = word << BITS | codes[i];
  for (int i = 0; i < Group<BITS>::BYTES; ++i) packed[i] = (u8)(word >> (8 * (Group<BITS>::BYTES - 1 - i)));
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI__)
#include <immintrin.h>

// 64 codes. Eight of them are BITS bytes: a permute brings these into a word of 64 bits, the first one on
// top, from which a multishift takes 8 bits at 8 places.
template <int BITS>
static inline __m512i unpack64(const u8* packed) {
  const __m512i bytes = _mm512_maskz_loadu_epi8(~0ull >> (64 - 8 * BITS), packed);
  if (BITS == 8) return bytes;
  alignas(64) u8 source[64], shift[64];
  for (int i = 0; i < 64; ++i) {
    source[i] = (u8)(i / 8 * BITS + (i % 8 < BITS ? BITS - 1 - i % 8 : 0));
    shift[i] = (u8)(BITS * (7 - i % 8));
  }
  const __m512i words = _mm512_permutexvar_epi8(_mm512_load_si512(source), bytes);
  const __m512i shifted = _mm512_multishift_epi64_epi8(_mm512_load_si512(shift), words);
  return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << BITS) - 1));
}

// Neighbors are joined, to 2, 4 and then 8 codes; what stands above the latter's BITS bytes is left out.
template <int BITS>
static inline void pack64(__m512i codes, u8* packed) {
  alignas(64) u8 source[64];
  for (int i = 0; i < 64; ++i) source[i] = (u8)(i / BITS * 8 + BITS - 1 - i % BITS);
  const __m512i two = _mm512_maddubs_epi16(_mm512_set1_epi16(1 << 8 | 1 << BITS), codes);
  const __m512i four = _mm512_madd_epi16(two, _mm512_set1_epi32(1 << 16 | 1 << 2 * BITS));
  const __m512i eight = _mm512_or_si512(_mm512_slli_epi64(four, 4 * BITS), _mm512_srli_epi64(four, 32));
  const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(source), eight);
  _mm512_mask_storeu_epi8(packed, ~0ull >> (64 - 8 * BITS), bytes);
}

#define PERMUTE_PACKED 1
#else
#define PERMUTE_PACKED 0
#endif

#if defined(__AVX2__) && !(defined(__AVX512F__) && defined(__AVX512BW__))
#include <immintrin.h>
#define SHUFFLE_PACKED 1

// Where 16 bytes are loaded that hold 16 codes, those from 16 k on of COUNT: not beyond the last one's byte.
template <int BITS, int COUNT>
static constexpr int piece_at(int k) {
  return 2 * BITS * k < COUNT / 8 * BITS - 16 ? 2 * BITS * k : COUNT / 8 * BITS - 16;
}

// Of the 16 codes of either half, the first 8 or the others, in words of 16 bits. A shuffle brings the two bytes
// that a code may touch into its word, a multiplication shifts the code to the top.
template <int BITS, int COUNT, int K>
static inline __m256i unpack_words(__m256i packed, int others) {
  alignas(32) u8 source[32];
  alignas(32) u16 factor[16];
  for (int w = 0; w < 16; ++w) {
    const int k = K + w / 8, bit = (8 * others + w % 8) * BITS, byte = 2 * BITS * k - piece_at<BITS, COUNT>(k) + bit / 8;
    source[2 * w + 1] = (u8)byte;
    source[2 * w] = (u8)(bit % 8 + BITS > 8 ? byte + 1 : 0xff);
    factor[w] = (u16)(1 << bit % 8);
  }
  const __m256i words = _mm256_shuffle_epi8(packed, _mm256_load_si256((const __m256i*)source));
  return _mm256_srli_epi16(_mm256_mullo_epi16(words, _mm256_load_si256((const __m256i*)factor)), 16 - BITS);
}

// Codes 16 K .. 16 K + 31 of COUNT, which are 16 bytes or more.
template <int BITS, int COUNT, int K>
static inline __m256i unpack32(const u8* packed) {
  const __m128i low = _mm_loadu_si128((const __m128i*)(packed + piece_at<BITS, COUNT>(K)));
  const __m128i high = _mm_loadu_si128((const __m128i*)(packed + piece_at<BITS, COUNT>(K + 1)));
  const __m256i both = _mm256_set_m128i(high, low);
  return _mm256_packus_epi16(unpack_words<BITS, COUNT, K>(both, 0), unpack_words<BITS, COUNT, K>(both, 1));
}

template <int BITS>
static inline void unpack64(const u8* packed, u8* codes) {
  _mm256_storeu_si256((__m256i*)codes, unpack32<BITS, 64, 0>(packed));
  _mm256_storeu_si256((__m256i*)(codes + 32), unpack32<BITS, 64, 2>(packed));
}
#else
#define SHUFFLE_PACKED 0
#endif

// As many codes as come in whole groups. Where no code crosses a byte, shifts alone are faster: a
// compiler vectorizes them.
template <int BITS>
static inline int unpack_whole(const u8* packed, int count, u8* codes) {
#if PERMUTE_PACKED
  if (8 % BITS) {
    for (int i = 0; i + 64 <= count; i += 64) _mm512_storeu_si512(codes + i, unpack64<BITS>(packed + i * BITS / 8));
    return count / 64 * 64;
  }
#elif SHUFFLE_PACKED
  if (8 % BITS) {
    for (int i = 0; i + 64 <= count; i += 64) unpack64<BITS>(packed + i * BITS / 8, codes + i);
    return count / 64 * 64;
  }
#endif
  const int groups = count / Group<BITS>::CODES;
  for (int i = 0; i < groups; ++i) unpack_group<BITS>(packed + i * Group<BITS>::BYTES, codes + i * Group<BITS>::CODES);
  return groups * Group<BITS>::CODES;
}

template <int BITS>
static inline int pack_whole(const u8* codes, int count, u8* packed) {
#if PERMUTE_PACKED
  if (8 % BITS) {
    for (int i = 0; i + 64 <= count; i += 64) pack64<BITS>(_mm512_loadu_si512(codes + i), packed + i * BITS / 8);
    return count / 64 * 64;
  }
#endif
  const int groups = count / Group<BITS>::CODES;
  for (int i = 0; i < groups; ++i) pack_group<BITS>(codes + i * Group<BITS>::CODES, packed + i * Group<BITS>::BYTES);
  return groups * Group<BITS>::CODES;
}

// The bytes of a last group may be fewer than a whole one's.
template <int BITS>
static inline void unpack_codes(const u8* packed, int count, u8* codes) {
  if (BITS == 8) {
    __builtin_memcpy(codes, packed, count);
    return;
  }
  for (int i = unpack_whole<BITS>(packed, count, codes); i < count; i += Group<BITS>::CODES) {
    u8 bytes[Group<BITS>::BYTES] = {}, group[Group<BITS>::CODES];
    const int left = count - i < Group<BITS>::CODES ? count - i : Group<BITS>::CODES;
    __builtin_memcpy(bytes, packed + i * BITS / 8, (left * BITS + 7) / 8);
    unpack_group<BITS>(bytes, group);
    __builtin_memcpy(codes + i, group, left);
  }
}

template <int BITS>
static inline void pack_codes(const u8* codes, int count, u8* packed) {
  if (BITS == 8) {
    __builtin_memcpy(packed, codes, count);
    return;
  }
  for (int i = pack_whole<BITS>(codes, count, packed); i < count; i += Group<BITS>::CODES) {
    u8 bytes[Group<BITS>::BYTES], group[Group<BITS>::CODES] = {};
    const int left = count - i < Group<BITS>::CODES ? count - i : Group<BITS>::CODES;
    __builtin_memcpy(group, codes + i, left);
    pack_group<BITS>(group, bytes);
    __builtin_memcpy(packed + i * BITS / 8, bytes, (left * BITS + 7) / 8);
  }
}
