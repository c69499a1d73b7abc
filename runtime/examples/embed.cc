// How alike sentences are: mean-pooled embeddings of a sentence transformer, and their cosines.
//
//   qgraph_embed model.qg < ids.txt        a line of token ids for each sentence, such as "101 7592 2088 102"
//
// Prints the cosine of each sentence to the first. Tokenizers are beyond the runtime: Python's `tokenizers`,
// or tokenizers-cpp, make the ids. The sentences go through the model as one batch, the short ones padded.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "qgraph/qgraph.hpp"

namespace {

using Ids = std::vector<std::int64_t>;

std::vector<Ids> read_sentences(std::istream& in) {
  std::vector<Ids> sentences;
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    Ids ids;
    for (std::int64_t id; words >> id;) ids.push_back(id);
    if (!words.eof()) throw std::runtime_error("'" + line + "' is not a line of token ids");
    if (!ids.empty()) sentences.push_back(ids);
  }
  if (sentences.empty()) throw std::runtime_error("no token ids on the standard input");
  return sentences;
}

// [batch, width], each row of length 1.
std::vector<std::vector<double>> embed(const qgraph::Model& model, const std::vector<Ids>& sentences) {
  std::size_t batch = sentences.size(), length = 0;
  for (const Ids& ids : sentences) length = std::max(length, ids.size());
  Ids ids(batch * length), mask(batch * length), types(batch * length);
  for (std::size_t i = 0; i < batch; ++i) {
    std::copy(sentences[i].begin(), sentences[i].end(), &ids[i * length]);
    std::fill_n(&mask[i * length], sentences[i].size(), 1);
  }

  qgraph::Session session(model);
  const std::vector<qgraph::TensorInfo> inputs = model.inputs(), outputs = model.outputs();
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const std::string& name = inputs[i].name;
    const Ids* data = name == "input_ids"        ? &ids
                      : name == "attention_mask" ? &mask
                      : name == "token_type_ids" ? &types
                                                 : nullptr;
    if (!data) throw std::runtime_error("an input that this program does not know: " + name);
    session.bind_input(i, data->data(),
                       {static_cast<std::int64_t>(batch), static_cast<std::int64_t>(length)});
  }
  std::vector<std::vector<float>> results;
  std::size_t hidden = outputs.size();  // the output with a vector for each token
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    results.push_back(session.make_output<float>(i));
    if (outputs[i].dims.size() == 3 && hidden == outputs.size()) hidden = i;
  }
  if (hidden == outputs.size()) throw std::runtime_error("no output is [batch, sequence, width]");
  session.run();

  std::size_t width = static_cast<std::size_t>(session.output_shape(hidden)[2]);
  std::vector<std::vector<double>> rows(batch, std::vector<double>(width));
  for (std::size_t i = 0; i < batch; ++i) {
    double square = 0;
    for (std::size_t t = 0; t < sentences[i].size(); ++t) {
      const float* token = &results[hidden][(i * length + t) * width];
      for (std::size_t j = 0; j < width; ++j) rows[i][j] += token[j];
    }
    for (double x : rows[i]) square += x * x;
    for (double& x : rows[i]) x /= std::sqrt(square);
  }
  return rows;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc != 2) throw std::runtime_error("usage: qgraph_embed model.qg < ids.txt");
    const qgraph::Model model(argv[1]);
    const auto rows = embed(model, read_sentences(std::cin));
    for (const auto& row : rows) {
      double cosine = 0;
      for (std::size_t j = 0; j < row.size(); ++j) cosine += rows[0][j] * row[j];
      std::printf("%.6f\n", cosine);
    }
    return EXIT_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "qgraph_embed: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
