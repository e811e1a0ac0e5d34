// Work on the threads of the host process: each takes the next slice of it until there are none.

// The host's GOMP_parallel, so that kernels and torch share one pool of threads.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

enum { SLICES_PER_THREAD = 4 };  // a thread that is interrupted holds up the others less

// A slice, one of `count`, and which of the threads that take part has it.
struct Slice {
  i64 number, count, worker;
  i64 first_of(i64 items) const { return items * number / count; }
  i64 last_of(i64 items) const { return items * (number + 1) / count; }  // one past it
};

template <class Work>
struct Pool {
  const Work* work;
  i64 slices, next, workers;
};

template <class Work>
static void take_slices(void* data) {
  Pool<Work>* pool = (Pool<Work>*)data;
  const i64 worker = __atomic_fetch_add(&pool->workers, 1, __ATOMIC_RELAXED);
  for (;;) {
    const i64 number = __atomic_fetch_add(&pool->next, 1, __ATOMIC_RELAXED);
    if (number >= pool->slices) return;
    pool->work->take({number, pool->slices, worker});
  }
}

// Work is a struct that says what to do with a slice: `void take(Slice slice) const`.
template <class Work>
static void run_in_slices(const Work& work, i64 slices, i64 threads, Parallel parallel) {
  Pool<Work> pool = {&work, threads > 1 && parallel ? slices : 1, 0, 0};
  if (pool.slices > 1) parallel(take_slices<Work>, &pool, (unsigned)threads, 0);
  else take_slices<Work>(&pool);
}
