// Some columns of the weight as numbers: what many rows of a gradient are multiplied with.

// The numbers of a row's elements [from, to), with the bits that dequantizing gives.
static void decode_elements(const Parts& parts, const Row& row, const Levels& levels, i64 from, i64 to, Number* numbers) {
  for (i64 tile = from / GROUP * GROUP; tile < to; tile += TILE) {
    const i64 end = tile + TILE < to ? tile + TILE : to;
    Factors factors;
    find_factors(parts, row, tile, end, factors);
    const i64 offset = (row.start + tile) % SPAN;
    for (i64 group = tile; group < end; group += GROUP) {
      alignas(64) float x[GROUP];
      const u8* codes = row.codes + group / 8 * CODE_BITS;
      if (group + GROUP <= row.end) decode_in_order(codes, levels, x);
      else decode_in_order(load_part(codes, row.end - group).codes, levels, x);
      for (int i = 0; i < GROUP; i += ALIGNMENT) {
        const i64 span = (offset + group - tile + i) / SPAN;
        const float factor = PER == BLOCK ? factors.factor[span] : factor_at<Code>(parts, row.factor);
        for (int j = i; j < i + ALIGNMENT; ++j) x[j] *= factor;
        if (!Code::CENTERED) continue;
        const float center = PER == BLOCK ? factors.center[span] : center_at<Code>(parts, row.factor);
        for (int j = i; j < i + ALIGNMENT; ++j) x[j] += center;
      }
      const i64 low = from > group ? from - group : 0, high = end - group < GROUP ? end - group : GROUP;
      store_numbers(x + low, (int)(high - low), numbers + (group + low - from));
    }
  }
}

// Of rows [first, last), the columns that the job asks for.
static void decode_columns(const Job* job, i64, i64 first, i64 last) {
  const Levels levels = load_levels(job->parts.tables);
  for (i64 number = first; number < last; ++number) {
    const Row row = find_row(job, number);
    Number* to = job->y + number * (job->last - job->first);
    decode_elements(job->parts, row, levels, row.phase + job->first, row.phase + job->last, to);
  }
}
