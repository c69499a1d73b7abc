// Two models that are part of the program, as `codegen/static_library.py` wrote them, and what is refused.
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "aligned_file.h"
#include "check.h"
#include "decoder.h"
#include "qgraph/qgraph.hpp"
#include "toy.h"

namespace {

bool failed(const qg_static_model& artifact, qg_status expected, const char* text) {
  qg_model* model = reinterpret_cast<qg_model*>(1);
  qg_status status = qg_load_static(&artifact, nullptr, &model);
  if (status == expected && !model && std::strstr(qg_last_error(), text)) return true;
  std::fprintf(stderr, "expected status %d and \"%s\", got %d and \"%s\"\n", expected, text, status,
               qg_last_error());
  return false;
}

void test_both_run() {
  const qgraph::Model toy(toy_artifact), decoder(decoder_artifact);
  CHECK(toy.isa() == "wide" && decoder.isa() == "base");
  qgraph::Session session(toy), text(decoder);
  std::vector<int64_t> ids{1, 2, 3}, mask_ids{1, 1, 1};
  std::vector<float> mask{1, 1, 1};
  session.bind_input(0, ids.data(), {1, 3});
  session.bind_input(1, mask.data(), {1, 3});
  const std::vector<float> pooled = session.make_output<float>(0), twice = session.make_output<float>(1);
  const std::vector<int64_t> isa = session.make_output<int64_t>(2), sum = session.make_output<int64_t>(3);
  session.run();
  CHECK(isa[0] == 1);  // code of the right variant ran
  int64_t expected = 0;
  for (int64_t n = 0; n < 29; ++n) expected += (n + 1) * (1 + n);
  CHECK(sum[0] == expected && twice == std::vector<float>(6, 1));

  text.bind_input(0, ids.data(), {1, 3});
  text.bind_input(1, mask_ids.data(), {1, 3});
  const std::vector<float> logits = text.make_output<float>(0);
  const std::vector<int64_t> history = text.make_output<int64_t>(1);
  text.run();
  CHECK(history == ids && text.length() == 3);
}

// Mappings of this process that are executable.
int executable_mappings() {
  int count = 0;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    count += line.find("x", line.find(' ')) == line.find(' ') + 3;
  return count;
}

void test_code_is_run_where_it_is() {
  const int before = executable_mappings();
  const qgraph::Model toy(toy_artifact);
  CHECK(before > 0 && executable_mappings() == before);
}

void test_c_face() {
  qg_load_options options = QG_LOAD_OPTIONS_INIT;
  options.isa = "base";
  qg_model* model = nullptr;
  CHECK(toy_load(&options, &model) == QG_OK && std::strcmp(qg_model_isa(model), "base") == 0);
  qg_model_free(model);
  options.isa = "future";
  CHECK(toy_load(&options, &model) == QG_UNSUPPORTED && !model);
  CHECK(qg_load_static(nullptr, nullptr, &model) == QG_INVALID_ARGUMENT);

  const uint8_t key[QG_PUBLIC_KEY_SIZE] = {3};
  options = QG_LOAD_OPTIONS_INIT;
  options.public_key = key;
  CHECK(toy_load(&options, &model) == QG_UNTRUSTED && !model);
}

void test_refusals() {
  std::vector<qg_static_code> code(toy_artifact.code, toy_artifact.code + toy_artifact.code_count);
  qg_static_model artifact = toy_artifact;
  artifact.code = code.data();

  // A changed byte of code, though it lies where no file's hash reaches.
  const uint8_t* image = static_cast<const uint8_t*>(code[2].data);
  std::vector<uint8_t> changed(image, image + code[2].size);
  changed[changed.size() / 2] ^= 1;
  code[2].data = changed.data();
  CHECK(failed(artifact, QG_INVALID_FILE, "tensor 'qgraph.code.base' is damaged"));
  code[2] = toy_artifact.code[2];
  code[1].size -= 1;
  CHECK(failed(artifact, QG_INVALID_FILE, "tensor 'qgraph.code.wide' is damaged"));
  code[1] = toy_artifact.code[1];
  code[0].isa = "other";
  CHECK(failed(artifact, QG_INVALID_FILE, "tensor 'qgraph.code.other' has no hash"));
  artifact.code_count = 0;
  CHECK(failed(artifact, QG_INVALID_FILE, "qgraph.code."));
  artifact = toy_artifact;
  artifact.code = decoder_artifact.code;
  artifact.code_count = decoder_artifact.code_count;
  CHECK(failed(artifact, QG_INVALID_FILE, "qgraph.code.base"));

  artifact = toy_artifact;
  artifact.code = nullptr;
  CHECK(failed(artifact, QG_INVALID_ARGUMENT, "code is NULL"));
  artifact = toy_artifact;
  artifact.struct_size = 0;
  CHECK(failed(artifact, QG_INVALID_ARGUMENT, "struct_size"));
  artifact = toy_artifact;
  artifact.data = nullptr;
  CHECK(failed(artifact, QG_INVALID_ARGUMENT, "data is NULL"));

  // The container without its code is no artifact by itself.
  const uint8_t* bytes = static_cast<const uint8_t*>(toy_artifact.data);
  AlignedBytes copy = aligned_copy(bytes, toy_artifact.size);
  artifact = {sizeof(artifact), copy.get(), toy_artifact.size, nullptr, 0};
  CHECK(failed(artifact, QG_INVALID_FILE, "qgraph.code."));
  artifact = toy_artifact;
  artifact.data = copy.get();
  copy.get()[toy_artifact.size / 2] ^= 1;
  CHECK(failed(artifact, QG_INVALID_FILE, "damaged"));
}

}  // namespace

int main() {
  test_code_is_run_where_it_is();  // first: nothing else maps what it frees
  test_both_run();
  test_c_face();
  test_refusals();
}
