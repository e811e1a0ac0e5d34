// ---- the entry of the library: the phases of some jobs, one after the other

enum Phase { MEASURE, REDUCE, UPDATE };

struct Work {
  const Job* jobs;
  i64 job_count;
  Phase phase;

  void take(Slice slice) const {
    for (i64 j = 0; j < job_count; ++j) {
      const Job* job = jobs + j;
      void (*const run)(const Job*, i64, i64) = phase == UPDATE ? job->update : phase == MEASURE ? job->measure : job->reduce;
      const i64 count = phase == REDUCE ? job->row_count : job->chunk_count;
      const i64 first = slice.first_of(count), last = slice.last_of(count);
      if (run && first < last) run(job, first, last);
    }
  }
};

extern "C" void bnbx_run(const Job* jobs, i64 job_count, i64 threads, Parallel parallel) {
  bool measured = false;
  for (i64 j = 0; j < job_count; ++j) measured = measured || jobs[j].measure;
  for (int phase = measured ? MEASURE : UPDATE; phase <= UPDATE; ++phase)
    run_in_slices(Work{jobs, job_count, (Phase)phase}, threads * SLICES_PER_THREAD, threads, parallel);
}
