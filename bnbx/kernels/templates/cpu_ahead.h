// Memory asked for ahead. A step decodes, updates and encodes one chunk after another, and only the update
// touches parameters and gradients: the processor's own prefetchers pause in between. Asked for early, in
// pieces that do not fill its queue of misses, 16.8 M elements of 8-bit SGD take 0.52 ns each on a thread of a
// Granite Rapids and not 0.81, AdamW 1.01 and not 1.24. AMD's processors are left to themselves: an earlier
// form of this cost a Zen 5 time.

#if defined(__AVX2__) && !defined(__znver1__) && !defined(__znver2__) && !defined(__znver3__) && !defined(__znver4__) && !defined(__znver5__)
#define ASKS_AHEAD
#endif

// Elements; 256 ahead cost 15 % more, 1024 the same.
enum { AHEAD = 512, LINE = 64 };

// Elements [first, last) of `x`, also past its end: to ask for memory that is not there does nothing.
template <bool WRITTEN, class Number>
static inline void ask_for(const Number* x, i64 first, i64 last) {
  const char* end = (const char*)(x + last);
  for (const char* line = (const char*)(x + first); line < end; line += LINE) __builtin_prefetch(line, WRITTEN);
}
