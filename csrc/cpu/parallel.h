// The caller's threads, as the drivers use them. Baseline code only.
#pragma once

#include <atomic>
#include <cstdint>
#include <new>

#include "../include/qnb.h"

namespace qnb {

// Waking a thread and waiting for it costs microseconds: a job is cut into shares of at least this long.
constexpr double share_ns = 5000;

inline int64_t threads_of(const qnb_parallel* parallel) {
  return parallel == nullptr || parallel->run == nullptr || parallel->threads < 1 ? 1 : parallel->threads;
}

// How many shares a job of about `ns` nanoseconds on one thread, made of `units` equal units, is worth.
inline int64_t shares_for(double ns, int64_t units, const qnb_parallel* parallel) {
  const int64_t threads = threads_of(parallel);
  const int64_t worth = ns >= share_ns * static_cast<double>(threads) ? threads : static_cast<int64_t>(ns / share_ns);
  const int64_t shares = worth < units ? worth : units;
  return shares < 1 ? 1 : shares;
}

// Calls work(share, first unit, unit behind the last) for each share; shares differ by at most one unit.
template <class Work>
void for_shares(const qnb_parallel* parallel, int64_t shares, int64_t units, const Work& work) {
  if (shares <= 1) {
    work(int64_t{0}, int64_t{0}, units);
    return;
  }
  struct Job {
    const Work& work;
    int64_t shares, units;
  } job{work, shares, units};
  parallel->run(
      parallel->context, shares,
      [](void* argument, int64_t t) {
        const Job& j = *static_cast<const Job*>(argument);
        const int64_t each = j.units / j.shares, left = j.units % j.shares;
        const int64_t first = t * each + (t < left ? t : left);
        j.work(t, first, first + each + (t < left ? 1 : 0));
      },
      &job);
}

// What is left of a share's units, on a cache line of its own.
struct alignas(64) Claims {
  std::atomic<int64_t> next;
  int64_t end;
};

// Calls work(share, unit) once for each unit. A share begins with the units that for_shares would give it, the same in
// every call, so that weights may still lie in its core's cache; when these are done it takes over what others have
// left, so that a core which is busy elsewhere holds nobody up for long. `claims`: memory for one a share.
template <class Work>
void for_units(const qnb_parallel* parallel, int64_t shares, int64_t units, Claims* claims, const Work& work) {
  if (shares <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) work(int64_t{0}, unit);
    return;
  }
  for (int64_t t = 0, first = 0; t < shares; ++t) {
    const int64_t end = first + units / shares + (t < units % shares ? 1 : 0);
    new (claims + t) Claims{first, end};
    first = end;
  }
  for_shares(parallel, shares, shares, [&](int64_t share, int64_t, int64_t) {
    for (int64_t other = 0; other < shares; ++other) {
      Claims& from = claims[(share + other) % shares];
      for (int64_t unit; (unit = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;) work(share, unit);
    }
  });
}

}  // namespace qnb
