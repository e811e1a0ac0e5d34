// The quantized states of a chunk on a CPU: from codes to numbers, and back.
//
// Chunks are worked on SPAN elements at a time, and what goes on at once overlaps. Updates wait for divisions and
// roots, coding for permutes: so the states of the chunk before are encoded beside the update of this one. And
// memory is asked for early, a little at a time so as not to fill the processor's queue of misses; its own
// prefetchers pause while coding touches neither parameters nor gradients.

// Elements ahead. 256 cost 3 % more; 1024 cost AdamW 15 %, between steps of others.
enum { AHEAD = 512, LINE = 64 };

// To ask for memory past the end does nothing.
template <bool WRITTEN, class Number>
static inline void ask_for(const Number* x, int count) {
  if (!OVERLAP) return;
  for (int i = 0; i < count; i += LINE / (int)sizeof(Number)) __builtin_prefetch(x + i, WRITTEN);
}

template <class Type>
struct Stage {
  struct Piece : Type {
    static constexpr int BLOCK = SPAN;
  };
  enum { BUFFERS = LATE ? 2 : 1 };

  const Tables* const tables;
  // The chunk at hand.
  alignas(64) float numbers[BUFFERS][CHUNK];
  alignas(64) u8 unpacked[BUFFERS][CHUNK];  // its codes, where they are not bytes or fewer than a chunk
  const u8* codes;
  const float* absmax;
  int here, count;
  i32 largest[CHUNK / SPAN];  // magnitude in each SPAN of what is updated, as float bits
  // The one whose numbers are to be encoded.
  const float* late;
  u8 *encoded, *packed;
  Scale scales[CHUNK / Type::BLOCK];
  int done, pending;

  explicit Stage(const Tables* tables) : tables(tables), here(0), done(0), pending(0) {}

  float* at(int i) { return numbers[here] + i; }
  bool spread(int count) const { return Type::BITS < 8 || count < CHUNK; }

  // A last chunk is filled up with zeros.
  void open(const u8* from, const float* absmax_of, int elements) {
    if (LATE) here = 1 - here;
    codes = from, absmax = absmax_of, count = elements;
    __builtin_memset(largest, 0, sizeof largest);
    if (!spread(count)) return;
    if (count < CHUNK) __builtin_memset(unpacked[here], Type::ZERO_CODE, CHUNK);
    unpack_codes<Type::BITS>(from, count, unpacked[here]);
    codes = unpacked[here];
  }

  void decode(int i) { decode_block<Piece>(codes + i, absmax[Type::WHOLE ? 0 : i / Type::BLOCK], tables, at(i)); }

  // The next SPAN numbers of the chunk before.
  void encode() {
    if (done >= pending) return;
    const Scale scale = scales[Type::WHOLE ? 0 : done / Type::BLOCK];
    if (scale.inverse > 0.0f) encode_block<Piece>(late + done, scale.inverse, tables, encoded + done);
    else __builtin_memset(encoded + done, Type::ZERO_CODE, SPAN);
    done += SPAN;
  }

  void flush() {
    while (done < pending) encode();
    if (pending && encoded != packed) pack_codes<Type::BITS>(encoded, pending, packed);
    done = pending = 0;
  }

  // What was updated is to be encoded, to `to`; its scales are known.
  void hand_over(u8* to) {
    late = at(0), packed = to, encoded = spread(count) ? unpacked[here] : to, pending = count;
    if (!LATE) flush();
  }

  // The same, with scales that follow from the largest magnitudes.
  void close(u8* to, float* absmax_of) {
    flush();
    for (int block = 0; block * Type::BLOCK < count; ++block) {
      i32 most = 0;
      for (int span = block * Type::BLOCK / SPAN; span < (block + 1) * Type::BLOCK / SPAN; ++span) most = largest[span] > most ? largest[span] : most;
      scales[block] = make_scale<Type>((u32)most);
      absmax_of[block] = scales[block].absmax;
    }
    hand_over(to);
  }

  // The same where the absmax is that of the whole tensor.
  void close_whole(u32 largest, u8* to) {
    flush();
    scales[0] = make_scale<Type>(largest);
    hand_over(to);
  }
};
