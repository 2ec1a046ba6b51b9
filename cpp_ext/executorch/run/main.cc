// edge-lora-run: opens a bundle with ExecuTorch, swaps adapters in, and prints how long it takes.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "adapter_file.h"
#include "bundle.h"
#include "cpu.h"
#include "inputs.h"
#include "opened.h"
#include "status.h"

namespace edge_lora {
namespace {

using Report = nlohmann::ordered_json;

constexpr int kOk = 0;
constexpr int kFailed = 1;
constexpr int kUsage = 2;
constexpr const char* kHelp =
    "usage: edge-lora-run BUNDLE [NAME=FILE ...] [--runs N] [--threads N] [--tokens N]\n"
    "\n"
    "Opens a bundle with ExecuTorch, swaps each adapter in, runs it, gives the base back, and\n"
    "prints milliseconds as JSON. Takes no Python.\n"
    "\n"
    "  NAME=FILE    an adapter (safetensors), and what to call it\n"
    "  --runs N     runs per figure (default 50)\n"
    "  --threads N  threads of the engine and of swaps (default 1)\n"
    "  --tokens N   length of a language model's prompt (default 32)\n";

class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Options {
  std::string bundle;
  std::vector<std::pair<std::string, std::string>> adapters;  // name, file
  int runs = 50;
  int threads = 1;
  int tokens = 32;
};

int NumberOf(std::string_view option, std::string_view text) {
  int number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  constexpr int kMost = 1'000'000;
  if (error != std::errc() || end != text.data() + text.size() || number < 1 || number > kMost) {
    throw UsageError(std::string(option) + " is '" + std::string(text) + "', must be 1 to 1000000");
  }
  return number;
}

Options Parse(const std::vector<std::string>& arguments) {
  Options options;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    int* number = argument == "--runs"      ? &options.runs
                  : argument == "--threads" ? &options.threads
                  : argument == "--tokens"  ? &options.tokens
                                            : nullptr;
    const size_t equals = argument.find('=');
    if (number != nullptr) {
      if (++i == arguments.size()) throw UsageError(argument + " needs a number");
      *number = NumberOf(argument, arguments[i]);
    } else if (argument.starts_with('-')) {
      throw UsageError("unknown option '" + argument + "'");
    } else if (options.bundle.empty()) {
      options.bundle = argument;
    } else if (equals == std::string::npos || equals == 0) {
      throw UsageError("'" + argument + "' is not NAME=FILE");
    } else {
      const std::string name = argument.substr(0, equals);
      const auto is_same = [&](const auto& known) { return known.first == name; };
      if (std::ranges::any_of(options.adapters, is_same)) {
        throw UsageError("two adapters are named '" + name + "'");
      }
      options.adapters.emplace_back(name, argument.substr(equals + 1));
    }
  }
  if (options.bundle.empty()) throw UsageError("BUNDLE is missing");
  return options;
}

double Rounded(double ms) { return std::round(ms * 1e4) / 1e4; }

/// The nearest ranks of what was measured.
Report Percentiles(std::vector<double> ms) {
  std::ranges::sort(ms);
  const auto at = [&](double share) {
    const auto rank = static_cast<size_t>(std::ceil(share * static_cast<double>(ms.size())));
    return Rounded(ms[std::max<size_t>(rank, 1) - 1]);
  };
  return {{"p50", at(0.5)}, {"p90", at(0.9)}, {"p99", at(0.99)}, {"min", at(0)}, {"max", at(1)}};
}

/// What is run: one thing, or for a language model its two phases.
using Workload = std::vector<std::pair<std::string, std::vector<MadeInput>>>;

Workload WorkloadOf(const Bundle& bundle, const Program& program, int tokens) {
  if (bundle.cache_length == 0) return {{"forward", MakeInputs(bundle, program, {})}};
  const uint64_t length =
      std::min<uint64_t>(static_cast<uint64_t>(tokens), bundle.cache_length - 1);
  return {{"prefill", MakeInputs(bundle, program, {length, 0})},
          {"decode", MakeInputs(bundle, program, {1, length})}};
}

/// Root mean square of the first output: says whether an adapter did anything, and on another
/// device whether it did the same. Null unless that is fp32.
Report RmsOf(const std::vector<OutputTensor>& outputs) {
  if (outputs.empty() || outputs[0].type != ScalarType::Float) return nullptr;
  uint64_t count = 1;
  for (const int32_t size : outputs[0].sizes) count *= static_cast<uint64_t>(size);
  const auto* values = static_cast<const float*>(outputs[0].data.get());
  double sum = 0;
  for (uint64_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]) * values[i];
  return std::sqrt(sum / static_cast<double>(std::max<uint64_t>(count, 1)));
}

/// First run after a change, and the latency of the runs after it.
Report Measure(Program& program, const Workload& workload, int runs) {
  Report report;
  for (const auto& [phase, inputs] : workload) {
    const std::vector<InputTensor> views = Views(inputs);
    std::vector<OutputTensor> outputs;
    const auto run = [&] { outputs = program.Run(views); };
    const double first = Timed(run);
    std::vector<double> ms;
    ms.reserve(static_cast<size_t>(runs));
    for (int i = 0; i < runs; ++i) ms.push_back(Timed(run));
    report[phase] = {{"first_ms", Rounded(first)},
                     {"latency_ms", Percentiles(std::move(ms))},
                     {"output_rms", RmsOf(outputs)}};
  }
  return report;
}

Report MeasureAdapter(OpenedBundle& opened, const Bundle& bundle, const std::string& name,
                      const std::string& path, const Workload& workload, int runs) {
  std::shared_ptr<const AdapterFile> adapter;
  const double load = Timed([&] { adapter = AdapterFile::Open(path); });
  RequireFit(bundle, name, adapter->header());
  std::shared_ptr<Patch> patch;
  const double compile = Timed([&] { patch = opened.image().Compile({{adapter, 1.0}}); });
  // The first swap may touch memory for the first time; the second is what users see from then on.
  const double cold = Timed([&] { opened.image().Swap(patch); });
  opened.image().Swap(nullptr);
  const SwapStats swap = opened.image().Swap(patch);
  Report report = {{"name", name},
                   {"file_ms", Rounded(load)},
                   {"compile_ms", Rounded(compile)},
                   {"first_swap_ms", Rounded(cold)},
                   {"swap_ms", Rounded(swap.ms)},
                   {"swap_bytes", swap.bytes},
                   {"changed_values", patch->changed},
                   {"runs", Measure(opened.program(), workload, runs)}};
  return report;
}

Report Run(const Options& options) {
  const Bundle bundle = ReadBundle(options.bundle);
  OpenedBundle opened(bundle, options.threads);
  const Workload workload = WorkloadOf(bundle, opened.program(), options.tokens);
  const std::string base = opened.image().Sha256();
  Report report = {{"base", bundle.base_id},
                   {"engine", std::string("executorch ") + EDGE_LORA_EXECUTORCH_VERSION},
                   {"route", "packed"},
                   {"cpu", CpuFeatures()},
                   {"threads", options.threads},
                   {"slots", bundle.slots.size()},
                   {"program_bytes", bundle.size},
                   {"packed_bytes", opened.packed_bytes()},
                   {"check_ms", Rounded(opened.check_ms())},
                   {"load_ms", Rounded(opened.load_ms())},
                   {"bind_ms", Rounded(opened.bind_ms())},
                   {"runs", Measure(opened.program(), workload, options.runs)},
                   {"adapters", Report::array()}};
  for (const auto& [name, path] : options.adapters) {
    report["adapters"].push_back(
        MeasureAdapter(opened, bundle, name, path, workload, options.runs));
  }
  report["restore_ms"] = Rounded(Timed([&] { opened.image().Swap(nullptr); }));
  const std::vector<std::string> differing = opened.image().DifferingSlots();
  if (!differing.empty() || opened.image().Sha256() != base) {
    throw Error(Code::kInternal, ListAll("the base did not come back in these slots", differing));
  }
  report["is_base_again"] = true;
  return report;
}

int Main(const std::vector<std::string>& arguments) {
  if (std::ranges::find(arguments, "--help") != arguments.end()) {
    std::fputs(kHelp, stdout);
    return kOk;
  }
  try {
    std::cout << Run(Parse(arguments)).dump(1) << '\n';
    return std::cout.flush() ? kOk : kFailed;
  } catch (const UsageError& error) {
    std::cerr << kHelp << "\nError: " << error.what() << '\n';
    return kUsage;
  } catch (const std::bad_alloc&) {
    std::cerr << "Error: out of memory\n";
  } catch (const std::exception& error) {
    std::cerr << "Error: " << error.what() << '\n';
  }
  return kFailed;
}

}  // namespace
}  // namespace edge_lora

int main(int count, char** arguments) {
  return edge_lora::Main(std::vector<std::string>(arguments + 1, arguments + count));
}
