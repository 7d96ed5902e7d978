// Copies to shared memory that run on their own, a thread's, in groups. Only cuda_runtime.h
// includes this.
#pragma once

#include <cstring>
#include <deque>
#include <utility>
#include <vector>

namespace emulation {

inline int lax_waits = 0;  // groups that a wait leaves out, so that tests see what it is there for

// A group lands when the thread waits for it, at the latest moment that a GPU may take. Until then
// NaN stands where it goes, since a GPU may write at once, too.
class Copies {
  struct Copy {
    char* to;
    const void* from;  // or null: zeros
    int bytes;
  };
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;

 public:
  void begin(char* to, const void* from, int bytes) {
    std::memset(to, 0xff, bytes);
    open_.push_back({to, from, bytes});
  }

  void end_group() { groups_.push_back(std::exchange(open_, {})); }

  void wait_for_all_but(int pending) {
    while (static_cast<int>(groups_.size()) > pending + lax_waits) {
      for (const Copy& copy : groups_.front()) {
        if (copy.from) {
          std::memcpy(copy.to, copy.from, copy.bytes);
        } else {
          std::memset(copy.to, 0, copy.bytes);
        }
      }
      groups_.pop_front();
    }
  }
};

}  // namespace emulation
