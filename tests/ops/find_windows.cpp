// Looks for the last of many scores in one read (cpu/score_window.h), and says of each case whether
// the window held it and whether the answer is that of all keys in order.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "cpu/score_window.h"

using namespace tk;

constexpr int64_t kElements = kWindowElements + 12'345;

template <bool kSigned>
static void look(const char* name, const std::vector<float>& a, const std::vector<float>* b) {
  std::vector<uint32_t> keys(kElements);
  for (int64_t i = 0; i < kElements; ++i) {
    const float score = b ? (*b)[i] * a[i] : a[i];
    uint32_t bits;
    std::memcpy(&bits, &score, sizeof(bits));
    keys[i] = key_of(bits, kSigned);
  }
  std::sort(keys.begin(), keys.end(), std::greater<>());
  GlobalThresholdArgs call{};
  // Two items, of which the second does not begin with a whole register.
  const int64_t first = kElements / 3;
  const float* factors = b ? b->data() : nullptr;
  call.items = {
      {a.data(), factors, first, DType::f32, true},
      {a.data() + first, b ? factors + first : nullptr, kElements - first, DType::f32, true}};
  call.is_signed = kSigned;
  const ItemTasks tasks(call.items, 1 << 16);
  for (const int64_t wanted :
       {int64_t{1}, kElements / 60, kElements / 2, kElements * 9 / 10, kElements}) {
    call.wanted = wanted;
    const LastKey last = last_by_window<kSigned>(call, tasks, kElements, 2);
    const uint32_t key = keys[wanted - 1];
    const auto [begin, end] = std::equal_range(keys.begin(), keys.end(), key, std::greater<>());
    const int64_t left = wanted - (begin - keys.begin());
    const bool right = last.key == key && last.left == left && last.ties == end - begin;
    std::printf("%s, the first %lld: %s\n", name, static_cast<long long>(wanted),
                !last.known ? "missed"
                : right     ? "found"
                            : "wrong");
  }
}

int main() {
  // The seed is fixed: one window in some thousand misses what a sample of another seed says.
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> a(kElements), b(kElements);
  for (float& value : a) value = normal(random);
  for (float& value : b) value = normal(random);
  look<false>("magnitudes", a, nullptr);
  look<false>("products", a, &b);
  look<true>("signed", a, nullptr);
}
