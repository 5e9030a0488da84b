// Generate greedily from an export with onnxruntime's C++ API: token ids in, token ids out.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

std::vector<int64_t> parse_ids(const std::string& text) {
  std::vector<int64_t> ids;
  std::istringstream stream(text);
  for (std::string id; std::getline(stream, id, ',');) ids.push_back(std::stoll(id));
  if (ids.empty()) throw std::invalid_argument("no token ids");
  return ids;
}

Ort::Value row(std::vector<int64_t>& values) {
  const int64_t shape[] = {1, static_cast<int64_t>(values.size())};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<int64_t>(memory, values.data(), values.size(), shape, 2);
}

Ort::SessionOptions exact() {
  Ort::SessionOptions options;
  // Exact sums of 8-bit products (w8a8) on x86 processors without VNNI, too.
  options.AddConfigEntry("session.x64quantprecision", "1");
  return options;
}

// The inputs of a call: ids and mask first, then a cache for each past_key_values.
struct Decoder {
  Ort::Session session;
  std::vector<std::string> inputs{"input_ids", "attention_mask"}, outputs{"logits"};
  std::vector<Ort::Value> pasts;

  Decoder(Ort::Env& env, const std::filesystem::path& model)
      : session(env, model.c_str(), exact()) {
    Ort::AllocatorWithDefaultOptions allocator;
    const auto about = session.GetModelMetadata();
    const auto read = [&](const char* key) {
      const auto value = about.LookupCustomMetadataMapAllocated(key, allocator);
      if (!value) throw std::runtime_error(model.string() + ": not an export of parscale");
      return std::string(value.get());
    };
    // The streams' caches are rows of the batch, unless the export has them as heads.
    const int64_t rows =
        read("parscale.kv_layout") == "batch" ? std::stoll(read("parscale.streams")) : 1;
    const std::string prefix = "past_key_values";
    for (size_t i = 0; i < session.GetInputCount(); i++) {
      const std::string name = session.GetInputNameAllocated(i, allocator).get();
      if (name.rfind(prefix, 0) != 0) continue;
      inputs.push_back(name);
      outputs.push_back("present" + name.substr(prefix.size()));
      const auto type = session.GetInputTypeInfo(i);
      const auto tensor = type.GetTensorTypeAndShapeInfo();
      auto shape = tensor.GetShape();
      shape[0] = rows;
      shape[2] = 0;
      pasts.push_back(Ort::Value::CreateTensor(allocator, shape.data(), shape.size(),
                                               tensor.GetElementType()));
    }
  }

  // Feed ids under a mask as long as all tokens so far; the likeliest next id.
  int64_t step(std::vector<int64_t> ids, std::vector<int64_t> mask) {
    std::vector<Ort::Value> values;
    values.push_back(row(ids));
    values.push_back(row(mask));
    std::move(pasts.begin(), pasts.end(), std::back_inserter(values));
    const auto input_names = pointers(inputs), output_names = pointers(outputs);
    auto results = session.Run(Ort::RunOptions{}, input_names.data(), values.data(), values.size(),
                               output_names.data(), output_names.size());
    pasts.assign(std::make_move_iterator(results.begin() + 1),
                 std::make_move_iterator(results.end()));
    const auto size = results[0].GetTensorTypeAndShapeInfo().GetShape().back();
    const auto count = results[0].GetTensorTypeAndShapeInfo().GetElementCount();
    const float* last = results[0].GetTensorData<float>() + count - size;
    return std::max_element(last, last + size) - last;
  }

  static std::vector<const char*> pointers(const std::vector<std::string>& names) {
    std::vector<const char*> result;
    for (const auto& name : names) result.push_back(name.c_str());
    return result;
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || argc > 5) {
    std::cerr << "Usage: generate FOLDER 1,2,3 [MAX_TOKENS] [END_TOKEN]\n";
    return 2;
  }
  try {
    const auto prompt = parse_ids(argv[2]);
    const size_t max_tokens = argc > 3 ? std::stoul(argv[3]) : 32;
    const int64_t end = argc > 4 ? std::stoll(argv[4]) : -1;

    Ort::Env env(ORT_LOGGING_LEVEL_ERROR);
    Decoder decoder(env, std::filesystem::path(argv[1]) / "model.onnx");
    auto ids = prompt;
    std::vector<int64_t> generated, mask(prompt.size(), 1);
    while (generated.size() < max_tokens && (generated.empty() || generated.back() != end)) {
      // As long as the ids in the first call, where the graph puts the prefix into the cache.
      generated.push_back(decoder.step(ids, mask));
      std::cout << (generated.size() > 1 ? "," : "") << generated.back() << std::flush;
      ids = {generated.back()};
      mask.push_back(1);
    }
    std::cout << "\n";
  } catch (const std::exception& error) {
    std::cerr << "Error: " << error.what() << "\n";
    return 1;
  }
}
