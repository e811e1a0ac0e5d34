// The quantized states of a chunk on a CPU: from codes to numbers, and back.
//
// A chunk is worked on SPAN elements at a time: they are decoded, updated, and asked for further ahead. Its states can
// be encoded only when the largest magnitude of each block is known. With OVERLAP that is done beside the update of the
// next chunk, since updates wait for divisions and roots, and coding for permutes. And memory is asked for early, a
// little at a time so as not to fill the processor's queue of misses: its own prefetchers pause while coding touches
// neither parameters nor gradients.

// How far, in elements. Where other programs' steps come between, so that everything comes from memory, 256 cost 3 %
// more, and 1024 cost AdamW 15 %. And how far the next page, of which 8 lines cost 2 % more; pages of codes are few.
enum { AHEAD = 512, PAGE_AHEAD = 256, PAGE_LINES = 4 };

// Does no harm past the end of x.
template <bool WRITTEN, class Number>
static inline void ask_for(const Number* x, int count) {
  if (!OVERLAP) return;
  const int bytes = count * (int)sizeof(Number);
  for (int i = 0; i < bytes; i += LINE) __builtin_prefetch((const char*)x + i, WRITTEN);
  if (sizeof(Number) > 1) begin_page<WRITTEN>(x + PAGE_AHEAD, bytes, PAGE_LINES);
}

// For each chunk: open; decode, and encode, each span; close. At the end: flush.
template <class Type>
struct Stage {
  struct Piece : Type {
    static constexpr int BLOCK = SPAN;
  };
  enum { BUFFERS = OVERLAP ? 2 : 1 };  // of chunks in turn

  const Tables* const tables;
  alignas(64) float numbers[BUFFERS][CHUNK];
  alignas(64) u8 unpacked[BUFFERS][CHUNK];  // codes that are packed in memory, or fewer than a chunk

  // The chunk at hand.
  int buffer = 0, count;
  const u8* codes;
  const float* absmax;
  i32 largest[CHUNK / Type::BLOCK];  // magnitude in each block of what is updated, as float bits

  // The chunk whose numbers are encoded: `done` of `pending` are.
  const float* late_numbers;
  u8 *late_codes, *late_packed;  // the same where nothing has to be packed
  Scale late_scales[CHUNK / Type::BLOCK];
  int done = 0, pending = 0;

  explicit Stage(const Tables* of_type) : tables(of_type) {}

  float* numbers_at(int i) { return numbers[buffer] + i; }
  bool is_unpacked() const { return Type::BITS < 8 || count < CHUNK; }

  // Codes that a last chunk lacks are those of zero.
  void open(const u8* from, const float* absmax_from, int elements) {
    if (OVERLAP) buffer = 1 - buffer;
    codes = from, absmax = absmax_from, count = elements;
    __builtin_memset(largest, 0, sizeof largest);
    if (!is_unpacked()) return;
    if (count < CHUNK) __builtin_memset(unpacked[buffer], Type::ZERO_CODE, CHUNK);
    unpack_codes<Type::BITS>(from, count, unpacked[buffer]);
    codes = unpacked[buffer];
  }

  // The span at `at`, if there is one.
  void decode(int at) {
    if (at < count) decode_block<Piece>(codes + at, absmax[Type::WHOLE ? 0 : at / Type::BLOCK], tables, numbers_at(at));
  }

  // A magnitude in the span at `at`.
  void include(int at, i32 magnitude) {
    i32& most = largest[at / Type::BLOCK];
    if (magnitude > most) most = magnitude;
  }

  // The span at `at` is updated: where it ends a block, that block's largest is known, and the search for the next begins.
  void note(int at, Largest& most) {
    if ((at + SPAN) % Type::BLOCK && at + SPAN < count) return;
    include(at, largest_of(most));
    most = Largest();
  }

  // The next span of the chunk before.
  void encode() {
    if (done >= pending) return;
    const Scale scale = late_scales[Type::WHOLE ? 0 : done / Type::BLOCK];
    if (__builtin_expect(scale.inverse > 0.0f, 1)) encode_block<Piece>(late_numbers + done, scale.inverse, tables, late_codes + done);
    else __builtin_memset(late_codes + done, Type::ZERO_CODE, SPAN);
    done += SPAN;
  }

  void flush() {
    while (done < pending) encode();
    if (pending && late_codes != late_packed) pack_codes<Type::BITS>(late_codes, pending, late_packed);
    done = pending = 0;
  }

  // All spans are updated: to be encoded, to `to`, with scales that follow from their largest magnitudes.
  void close(u8* to, float* absmax_to) {
    flush();
    for (int block = 0; block * Type::BLOCK < count; ++block) {
      late_scales[block] = make_scale<Type>((u32)largest[block]);
      absmax_to[block] = late_scales[block].absmax;
    }
    hand_over(to);
  }

  // The same where the absmax is that of the whole tensor.
  void close_whole(u8* to, u32 largest_of_all) {
    flush();
    late_scales[0] = make_scale<Type>(largest_of_all);
    hand_over(to);
  }

  void hand_over(u8* to) {
    late_numbers = numbers_at(0), late_packed = to, late_codes = is_unpacked() ? unpacked[buffer] : to, pending = count;
    if (!OVERLAP) flush();
  }
};
