// ---- running jobs on the threads of the host process

enum Phase { MEASURE, REDUCE, UPDATE };

struct Work {
  const Job* jobs;
  i64 job_count, slices, next;
  Phase phase;
};

static void work_on(void* data) {
  Work* work = (Work*)data;
  for (;;) {
    const i64 slice = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (slice >= work->slices) return;
    for (i64 j = 0; j < work->job_count; ++j) {
      const Job* job = work->jobs + j;
      void (*const run)(const Job*, i64, i64) =
          work->phase == UPDATE ? job->update : work->phase == MEASURE ? job->measure : job->reduce;
      const i64 count = work->phase == REDUCE ? job->row_count : job->chunk_count;
      const i64 first = count * slice / work->slices;
      const i64 last = count * (slice + 1) / work->slices;
      if (run && first < last) run(job, first, last);
    }
  }
}

// `parallel` is the host's GOMP_parallel, so that kernels and torch share one pool of threads.
// More slices than threads: a thread that is interrupted holds up the others less.
extern "C" void bnbx_run(const Job* jobs, i64 job_count, i64 threads,
                         void (*parallel)(void (*)(void*), void*, unsigned, unsigned)) {
  bool measured = false;
  for (i64 j = 0; j < job_count; ++j) measured = measured || jobs[j].measure;
  for (int phase = measured ? MEASURE : UPDATE; phase <= UPDATE; ++phase) {
    Work work = {jobs, job_count, 1, 0, (Phase)phase};
    if (threads > 1 && parallel) {
      work.slices = threads * 4;
      parallel(work_on, &work, (unsigned)threads, 0);
    } else {
      work_on(&work);
    }
  }
}
