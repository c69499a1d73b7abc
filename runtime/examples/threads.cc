// One model, many threads: each has a session of its own, and all get the same bits.
//
//   qgraph_threads model.qg [THREADS] [RUNS]        16 threads and 1000 runs each, if not given
//
// Inputs are ones; every dimension that has a name is 8, or the nearest that the model takes.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "qgraph/qgraph.hpp"

namespace {

using Bytes = std::vector<std::uint64_t>;  // aligned for any dtype

// What a model's inputs are, for all sessions: they only read them.
struct Inputs {
  explicit Inputs(const qgraph::Model& model) : infos(model.inputs()) {
    std::map<std::string, std::int64_t> dims;
    for (std::size_t i = 0; i < qg_model_dim_count(model.get()); ++i) {
      std::int64_t min = 0, max = 0;
      const char* name = qg_model_dim(model.get(), i, &min, &max);
      dims[name] = std::clamp<std::int64_t>(8, min, std::max(min, max));
    }
    for (const qgraph::TensorInfo& info : infos) {
      std::vector<std::int64_t> shape;
      std::size_t size = 1;
      for (const std::string& dim : info.dims) {
        auto named = dims.find(dim);
        shape.push_back(named != dims.end() ? named->second : std::atoll(dim.c_str()));
        size *= static_cast<std::size_t>(shape.back());
      }
      shapes.push_back(shape);
      data.push_back(ones(info.dtype, size));
    }
  }

  static Bytes ones(qg_dtype dtype, std::size_t size) {
    Bytes bytes(size * qg_dtype_size(dtype) / sizeof(std::uint64_t) + 1);
    for (std::size_t i = 0; i < size; ++i) {
      char* element = reinterpret_cast<char*>(bytes.data()) + i * qg_dtype_size(dtype);
      const float real = 1;
      const std::int64_t whole = 1;
      std::memcpy(element, dtype == QG_F32 ? static_cast<const void*>(&real) : &whole, qg_dtype_size(dtype));
    }
    return bytes;
  }

  std::vector<qgraph::TensorInfo> infos;
  std::vector<std::vector<std::int64_t>> shapes;
  std::vector<Bytes> data;
};

// A session with memory of its own for the outputs.
struct Worker {
  Worker(const qgraph::Model& model, const Inputs& inputs) : session(model, 1) {
    for (std::size_t i = 0; i < inputs.infos.size(); ++i) {
      session.bind_input(i, inputs.data[i].data(), inputs.infos[i].dtype, inputs.shapes[i]);
    }
    const std::vector<qgraph::TensorInfo> infos = model.outputs();
    for (std::size_t i = 0; i < infos.size(); ++i) {
      const std::vector<std::int64_t> shape = session.output_shape(i);
      std::size_t size = qg_dtype_size(infos[i].dtype);
      for (std::int64_t extent : shape) size *= static_cast<std::size_t>(extent);
      outputs.emplace_back(size / sizeof(std::uint64_t) + 1);
      session.bind_output(i, outputs.back().data(), infos[i].dtype, shape);
    }
  }

  const std::vector<Bytes>& run() {
    if (session.capacity() > 0) session.reset();  // a decoder: the same text from its start
    session.run();
    return outputs;
  }

  qgraph::Session session;
  std::vector<Bytes> outputs;
};

int count(int argc, char** argv, int index, int otherwise) {
  int value = argc > index ? std::atoi(argv[index]) : otherwise;
  if (value < 1) throw std::runtime_error(std::string(argv[index]) + " is not a number from 1 up");
  return value;
}

void run(int argc, char** argv) {
  if (argc < 2) throw std::runtime_error("usage: qgraph_threads model.qg [THREADS] [RUNS]");
  const int threads = count(argc, argv, 2, 16), runs = count(argc, argv, 3, 1000);
  const qgraph::Model model(argv[1]);
  const Inputs inputs(model);
  const std::vector<Bytes> expected = Worker(model, inputs).run();

  std::atomic<int> different{0}, failed{0};
  std::vector<std::thread> pool;
  auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < threads; ++i) {
    pool.emplace_back([&] {
      try {
        Worker worker(model, inputs);
        for (int r = 0; r < runs; ++r) different += worker.run() != expected;
      } catch (const std::exception& error) {  // must not leave a thread
        std::fprintf(stderr, "qgraph_threads: %s\n", error.what());
        ++failed;
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  if (failed > 0) throw std::runtime_error(std::to_string(failed) + " threads failed");
  std::printf("%d threads, %d runs each: %d differ, %.0f runs/s\n", threads, runs, different.load(),
              threads * runs / seconds.count());
  if (different > 0) throw std::runtime_error("results differ");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
    return EXIT_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "qgraph_threads: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
