// Memory does not grow: many runs of one session, many loads and sessions.
//
//   soak model.qg RUNS CYCLES        model: a toy (tests/runtime/artifact_builder.py)
//
// Prints by how many kilobytes the process grew behind a warm-up of a tenth, and fails above 1000.
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

#include "check.h"
#include "qgraph/qgraph.hpp"

namespace {

constexpr int64_t kMostKilobytes = 1000;

int64_t resident_kilobytes() {
  std::ifstream file("/proc/self/statm");
  int64_t size = 0, resident = 0;
  CHECK(file >> size >> resident);
  return resident * sysconf(_SC_PAGESIZE) / 1000;
}

struct Toy {
  Toy(const qgraph::Model& model, int threads) : session(model, threads) {}
  void run(int64_t batch, int64_t length) {
    session.bind_input(0, ids.data(), {batch, length});
    session.bind_input(1, mask.data(), {batch, length});
    session.bind_output(0, pooled.data(), {batch, 8});
    session.bind_output(1, twice.data(), {2 * batch, length});
    session.bind_output(2, &isa, {1});
    session.bind_output(3, &sum, {});
    session.run();
  }
  std::vector<int64_t> ids = std::vector<int64_t>(4 * 16);
  std::vector<float> mask = std::vector<float>(4 * 16), pooled = std::vector<float>(4 * 8),
                     twice = std::vector<float>(8 * 16);
  int64_t isa = 0, sum = 0;
  qgraph::Session session;
};

template <typename Step>
bool grows(const char* what, int64_t count, Step step) {
  for (int64_t i = 0; i < count / 10 + 1; ++i) step(i);
  const int64_t before = resident_kilobytes();
  for (int64_t i = 0; i < count; ++i) step(i);
  const int64_t grown = resident_kilobytes() - before;
  std::printf("%lld %s: %lld kB more\n", static_cast<long long>(count), what, static_cast<long long>(grown));
  return grown > kMostKilobytes;
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 4);
  const int64_t runs = std::atoll(argv[2]), cycles = std::atoll(argv[3]);
  CHECK(runs > 0 && cycles > 0);
  const qgraph::Model model(argv[1]);
  Toy toy(model, 2);
  // Shapes change now and then, inputs are refused now and then.
  bool bad = grows("runs", runs, [&](int64_t i) {
    toy.ids[0] = i % 100 == 99 ? 1000 : 1;
    try {
      toy.run(1 + i % 4, 1 + i / 8 % 16);
      CHECK(i % 100 != 99);
    } catch (const qgraph::Error& error) {
      CHECK(error.status() == QG_BAD_DATA && i % 100 == 99);
    }
  });
  bad |= grows("load and unload", cycles, [&](int64_t i) {
    const qgraph::Model fresh(argv[1]);
    Toy session(fresh, 1 + static_cast<int>(i % 2));
    session.run(2, 3);
  });
  return bad ? 1 : 0;
}
