/* Threads for the kernels: those of the OpenMP runtime that torch has loaded, if there is one, or else our own pool.
 *
 * torch's threads keep spinning for a while after each of its operations. A second pool would compete with them for the
 * same cores, so on Linux the kernels run on torch's threads: Python passes the address of GOMP_parallel.
 */
#include "quantize8.h"

#ifdef _WIN32
#include <windows.h>
typedef SRWLOCK mutex_t;
typedef CONDITION_VARIABLE condition_t;
#define MUTEX_INIT SRWLOCK_INIT
#define CONDITION_INIT CONDITION_VARIABLE_INIT
#define lock(m) AcquireSRWLockExclusive(m)
#define try_lock(m) TryAcquireSRWLockExclusive(m)
#define unlock(m) ReleaseSRWLockExclusive(m)
#define wait(c, m) SleepConditionVariableSRW(c, m, INFINITE, 0)
#define wake_all(c) WakeAllConditionVariable(c)
#else
#include <pthread.h>
typedef pthread_mutex_t mutex_t;
typedef pthread_cond_t condition_t;
#define MUTEX_INIT PTHREAD_MUTEX_INITIALIZER
#define CONDITION_INIT PTHREAD_COND_INITIALIZER
#define lock(m) pthread_mutex_lock(m)
#define try_lock(m) (pthread_mutex_trylock(m) == 0)
#define unlock(m) pthread_mutex_unlock(m)
#define wait(c, m) pthread_cond_wait(c, m)
#define wake_all(c) pthread_cond_broadcast(c)
#endif

struct job {
  void (*work)(void *, int64_t);
  void *context;
  int64_t count, next;
};

typedef void gomp_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
static gomp_parallel *openmp;

/* Sets the address of GOMP_parallel, or NULL to use the pool. */
EXPORT void q8_set_openmp(void *address) { openmp = (gomp_parallel *)address; }

static void take_items(void *data) {
  struct job *job = data;
  int64_t item;
  while ((item = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED)) < job->count) job->work(job->context, item);
}

#define MOST_THREADS 256
static mutex_t in_use = MUTEX_INIT, state = MUTEX_INIT; /* one job at a time; guards the variables below */
static condition_t changed = CONDITION_INIT;
static struct job *current;
static int started, wanted, working; /* threads started, still allowed to join the job, working on it */

static void serve(void) {
  lock(&state);
  for (;;) {
    while (!wanted) wait(&changed, &state);
    wanted--;
    working++;
    struct job *job = current;
    unlock(&state);
    take_items(job);
    lock(&state);
    working--;
    wake_all(&changed);
  }
}

#ifdef _WIN32
static void reset_after_fork(void) {}
static DWORD WINAPI thread_body(void *unused) { (void)unused; serve(); return 0; }
static int start_thread(void) {
  HANDLE thread = CreateThread(NULL, 0, thread_body, NULL, 0, NULL);
  if (thread) CloseHandle(thread);
  return thread != NULL;
}
#else
static void forget_threads(void) { /* a forked process inherits the locks, but not the threads */
  in_use = state = (mutex_t)MUTEX_INIT;
  changed = (condition_t)CONDITION_INIT;
  started = wanted = working = 0;
}
static void reset_after_fork(void) { pthread_atfork(NULL, NULL, forget_threads); }
static void *thread_body(void *unused) { (void)unused; serve(); return NULL; }
static int start_thread(void) {
  pthread_t thread;
  if (pthread_create(&thread, NULL, thread_body, NULL)) return 0;
  pthread_detach(thread);
  return 1;
}
#endif

static void run_on_pool(struct job *job, int threads) {
  if (!try_lock(&in_use)) { /* another thread uses the pool: do this job alone */
    take_items(job);
    return;
  }
  lock(&state);
  static int registered;
  if (!registered) reset_after_fork();
  registered = 1;
  while (started < threads - 1 && start_thread()) started++;
  current = job;
  wanted = started < threads - 1 ? started : threads - 1;
  wake_all(&changed);
  unlock(&state);
  take_items(job);
  lock(&state);
  wanted = 0; /* threads that have not joined yet are too late */
  while (working) wait(&changed, &state);
  unlock(&state);
  unlock(&in_use);
}

void run_parallel(int64_t count, int threads, void (*work)(void *context, int64_t item), void *context) {
  struct job job = {work, context, count, 0};
  if (threads > count) threads = (int)count;
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  if (threads <= 1) take_items(&job);
  else if (openmp) openmp(take_items, &job, (unsigned)threads, 0);
  else run_on_pool(&job, threads);
}
