// A program that is its model: no file, no memory made executable, no threads, and what a run computes with
// in a block that is set aside.
//
//   qgraph compile encoder.onnx --format static-lib -o model    makes libmodel.a and model.h
//   qgraph_static ID [ID ...]                                   runs it on these token ids
//
// Every input is [1, length] int64: the ids for `input_ids`, ones for `attention_mask`, else zeros. Prints
// the first numbers of each output, f32, and how much of the block the run took.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"
#include "qgraph/qgraph.hpp"

namespace {

constexpr std::size_t kArena = std::size_t{16} << 20;
alignas(64) unsigned char arena[kArena];

// Hands out the arena from its start; gives back what was handed out last, which is enough for a session
// that grows.
struct Stack {
  std::size_t used = 0, most = 0;

  static void* allocate(void* context, std::size_t size, std::size_t alignment) {
    Stack& stack = *static_cast<Stack*>(context);
    std::size_t begin = (stack.used + alignment - 1) / alignment * alignment;
    if (begin > kArena || size > kArena - begin) return nullptr;  // becomes QG_OUT_OF_MEMORY
    stack.used = begin + size;
    if (stack.used > stack.most) stack.most = stack.used;
    return arena + begin;
  }

  static void deallocate(void* context, void* memory, std::size_t size) {
    Stack& stack = *static_cast<Stack*>(context);
    unsigned char* begin = static_cast<unsigned char*>(memory);
    if (begin + size == arena + stack.used) stack.used = static_cast<std::size_t>(begin - arena);
  }
};

void run(const std::vector<std::int64_t>& ids) {
  const std::vector<std::int64_t> ones(ids.size(), 1), zeros(ids.size(), 0),
      shape{1, static_cast<std::int64_t>(ids.size())};
  Stack stack;
  qg_load_options load = QG_LOAD_OPTIONS_INIT;
  load.threads = 1;
  const qgraph::Model model(model_artifact, load);
  qg_session_options options = QG_SESSION_OPTIONS_INIT;
  options.threads = 1;
  options.allocate = Stack::allocate;
  options.deallocate = Stack::deallocate;
  options.allocator_context = &stack;
  qgraph::Session session(model, options);

  const std::vector<qgraph::TensorInfo> inputs = model.inputs(), outputs = model.outputs();
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const std::string& name = inputs[i].name;
    const auto& data = name == "input_ids" ? ids : name == "attention_mask" ? ones : zeros;
    session.bind_input(i, data.data(), shape);
  }
  std::vector<std::vector<float>> results;
  for (std::size_t i = 0; i < outputs.size(); ++i) results.push_back(session.make_output<float>(i));
  session.run();
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    std::printf("%s:", outputs[i].name.c_str());
    for (std::size_t j = 0; j < results[i].size() && j < 4; ++j) std::printf(" %.9g", results[i][j]);
    std::printf("\n");
  }
  std::printf("%s, %zu of %zu bytes\n", model.isa().c_str(), stack.most, kArena);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc < 2) throw std::runtime_error("usage: qgraph_static ID [ID ...]");
    std::vector<std::int64_t> ids;
    for (int i = 1; i < argc; ++i) ids.push_back(std::stoll(argv[i]));
    run(ids);
    return EXIT_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "qgraph_static: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
