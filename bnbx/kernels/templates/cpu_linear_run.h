// ---- the entries of the library, on the threads of the host process

struct Work {
  const Job* job;
  void (*run)(const Job*, i64, i64, i64);
  i64 what;

  void take(Slice slice) const {
    const i64 first = slice.first_of(job->rows), last = slice.last_of(job->rows);
    if (first < last) run(job, what, first, last);
  }
};

static void run(const Work& work, i64 threads, Parallel parallel) { run_in_slices(work, threads * SLICES_PER_THREAD, threads, parallel); }

template <int M>
static void multiply_inputs(const Job* job, i64 input, i64 threads, Parallel parallel) {
  for (i64 phase = 0; phase < ALIGNMENT; phase += phase_step(job->columns)) lay_out<M>(job, input, phase, laid_out(job, phase));
  run({job, multiply<M>, input}, threads, parallel);
}

// Multiplies some rows of x, from `input` on; how many.
static i64 multiply_some(const Job* job, i64 input, i64 threads, Parallel parallel) {
  const i64 left = job->inputs - input;
#ifdef FIXED_POINT
  if (const i64 rows = lay_out_fixed(job, input)) {
    run({job, multiply_fixed, input}, threads, parallel);
    return rows;
  }
#endif
#ifdef PAIRS
  if (left == 1 && in_pairs(job, input)) {
    lay_out_pairs(job, input, (bfloat16*)job->room);
    run({job, multiply_in_pairs, input}, threads, parallel);
    return left;
  }
#endif
  if (left == 1) multiply_inputs<1>(job, input, threads, parallel);
  else if (left == 2) multiply_inputs<2>(job, input, threads, parallel);
  else multiply_inputs<MOST_INPUTS>(job, input, threads, parallel);
  return MOST_INPUTS;
}

// y = x times the weight, transposed, plus bias.
extern "C" void bnbx_multiply(const Job* job, i64 threads, Parallel parallel) {
  for (i64 input = 0; input < job->inputs;) input += multiply_some(job, input, threads, parallel);
}

// Whether x is multiplied as integers, if its numbers are not strange.
extern "C" i64 bnbx_in_integers(const Tables* tables, i64 columns) {
#ifdef FIXED_POINT
  return can_be_fixed(tables, columns);
#else
  return 0;
#endif
}

// The room that a job needs, in floats.
extern "C" i64 bnbx_room_for(i64 columns, i64 inputs) {
  i64 room = ALIGNMENT / phase_step(columns) * MOST_INPUTS * stride_of(columns);
#ifdef FIXED_POINT
  if (room < room_for_fixed(columns, inputs)) room = room_for_fixed(columns, inputs);
#endif
  return room;
}

// y = columns [first, last) of the weight.
extern "C" void bnbx_decode_columns(const Job* job, i64 threads, Parallel parallel) {
  run({job, decode_columns, 0}, threads, parallel);
}

// Whether the processor and the system let tiles be used.
extern "C" i64 bnbx_has_tiles() {
#if BFLOAT16_TILES
  return tiles_granted();
#else
  return 0;
#endif
}

// The room that each worker needs, in floats, for so many rows of x and outputs at a time.
extern "C" i64 bnbx_room_for_tiles(i64 rows, i64 panel) {
#if BFLOAT16_TILES
  return tile_room(rows, panel);
#else
  return 0;
#endif
}

// y = x times the weight, transposed, plus bias, or where `across`, x times the weight; only where there are tiles.
extern "C" void bnbx_multiply_tiles(const Job* job, i64 stride, i64 rows, i64 panel, i64 across, i64 threads, Parallel parallel) {
#if BFLOAT16_TILES
  if (across && panel > MOST_OUTPUTS) panel = MOST_OUTPUTS;  // what a line of the weight has room for
  run_in_slices(TileWork{job, stride, rows, panel, across != 0}, threads * SLICES_PER_THREAD, threads, parallel);
#endif
}
