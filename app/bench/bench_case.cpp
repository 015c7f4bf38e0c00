#include "app/bench/bench_case.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "app/bench/check.h"
#include "app/bench/data.h"
#include "app/bench/inputs.h"
#include "llm/error.h"
#include "moba/cache.h"
#include "src/stopwatch.h"

namespace moba::bench {
namespace {

using Samples = std::vector<std::span<std::byte>>;

Recipe recipe_of(const Setting& setting, const std::vector<Variant>& variants, const Conditions& conditions) {
  Recipe recipe{setting.pattern, conditions.seed, setting.heads / setting.kv_heads, setting.tokens};
  for (const Variant& variant : variants)
    recipe.sink_tokens = std::min(recipe.sink_tokens, variant.chunk_size);
  return recipe;
}

/// Rows of an output that every run must reproduce.
Samples sample_rows(const Inputs& inputs, const Array& array) {
  Samples samples;
  const auto row = static_cast<std::size_t>(array.tensor.strides[0]) * size_of(array.tensor.dtype);
  for (const Slice& probe : inputs.probes) {
    samples.push_back(array.memory.bytes().subspan(static_cast<std::size_t>(probe.offset) * row,
                                                   static_cast<std::size_t>(probe.count) * row));
  }
  return samples;
}

void add(Work& total, const Work& work) {
  total.attention_flops += work.attention_flops;
  total.gate_flops += work.gate_flops;
}

void add(Profile& total, const Profile& profile) {
  total.centroids += profile.centroids;
  total.gate += profile.gate;
  total.plan += profile.plan;
  total.attend += profile.attend;
  total.workspace_bytes = std::max(total.workspace_bytes, profile.workspace_bytes);
}

/// Shared by forward, backward and gate: q, k and v of one long sequence.
struct Shared {
  Inputs inputs;
  Recipe recipe;
  Array out;  // forward

  Shared(const Setting& setting, const std::vector<Variant>& variants, const Conditions& conditions,
         const Parallel& parallel)
      : inputs(make_inputs(setting, variants, conditions, parallel)),
        recipe(recipe_of(setting, variants, conditions)) {
    inputs.q = array(inputs.queries(), setting.heads);
    for (const Slice& slice : inputs.slices)
      fill(rows_of(inputs.q.tensor, slice.offset, slice.count), Role::query, recipe, slice.first, parallel);
    inputs.k = filled(Role::key, setting.kv_heads);
    if (setting.pass != Pass::gate) inputs.v = filled(Role::value, setting.kv_heads);
    if (setting.pass == Pass::forward) out = array(inputs.queries(), setting.heads);
  }

  Array array(std::int64_t tokens, std::int64_t heads) const {
    return {inputs.setting.dtype, tokens, heads, inputs.setting.head_dim};
  }
  Array filled(Role role, std::int64_t heads) const {
    Array result = array(inputs.setting.tokens, heads);
    fill(result.tensor, role, recipe, 0, inputs.parallel);
    return result;
  }
};

class Forward : public BenchCase {
 public:
  Forward(std::shared_ptr<Shared> shared, const Variant& variant)
      : shared_(std::move(shared)), variant_(variant), whole_(whole_work(inputs(), variant)) {}

  Checked check() override {
    poison(shared_->out.memory.bytes());
    Checked checked;
    Profile last;
    for (const Slice& slice : inputs().slices) {
      Blocks blocks(inputs(), variant_, slice);
      checked.wall_seconds += attend(slice, blocks.data(), last, checked.stages);
      check_probes(inputs(), variant_, blocks, &shared_->out.tensor, checked);
      add(computed_, work_of(inputs(), variant_, blocks));
    }
    checked.work = sampled() ? whole_ : computed_;
    checked.seconds = scaled(checked.wall_seconds, last, checked.stages);
    return checked;
  }

  double run(Profile& stages) override {
    Profile profile, last;
    double seconds = 0;
    for (const Slice& slice : inputs().slices) seconds += attend(slice, nullptr, last, profile);
    seconds = scaled(seconds, last, profile);
    add(stages, profile);
    return seconds;
  }

  Samples sample() override { return sample_rows(inputs(), shared_->out); }

 private:
  const Inputs& inputs() const { return shared_->inputs; }
  bool sampled() const { return inputs().setting.share < 1; }

  /// Seconds of a slice; its stages are `last`, and added to `profile`.
  double attend(const Slice& slice, std::int32_t* selection, Profile& last, Profile& profile) const {
    const Tensor q = rows_of(inputs().q.tensor, slice.offset, slice.count);
    const Tensor out = rows_of(shared_->out.tensor, slice.offset, slice.count);
    last = {};
    const double seconds = seconds_of([&] {
      attention(q, inputs().keys(slice.end()), inputs().values(slice.end()),
                one_sequence(slice.count, slice.end()), routing_of(variant_),
                {.out = out, .selection = selection}, inputs().execution(&last));
    });
    add(profile, last);
    return seconds;
  }

  /// From the slices to all tokens: every stage by its own work; the centroids once, from the last slice's.
  double scaled(double seconds, const Profile& last, Profile& profile) const {
    if (!sampled()) return seconds;
    const auto tokens = static_cast<double>(inputs().setting.tokens);
    profile.centroids = last.centroids * tokens / static_cast<double>(inputs().slices.back().end());
    if (computed_.gate_flops > 0) profile.gate *= whole_.gate_flops / computed_.gate_flops;
    profile.plan *= tokens / static_cast<double>(inputs().queries());
    profile.attend *= whole_.attention_flops / computed_.attention_flops;
    return profile.centroids + profile.gate + profile.plan + profile.attend;
  }

  std::shared_ptr<Shared> shared_;
  Variant variant_;
  Work whole_, computed_;
};

class Gate : public BenchCase {
 public:
  Gate(std::shared_ptr<Shared> shared, const Variant& variant)
      : shared_(std::move(shared)), variant_(variant), blocks_(inputs(), variant, inputs().slices.front()) {}

  Checked check() override {
    poison(std::as_writable_bytes(std::span(blocks_.blocks)));
    Checked checked;
    checked.seconds = checked.wall_seconds = run(checked.stages);
    check_probes(inputs(), variant_, blocks_, nullptr, checked);
    checked.work.gate_flops = work_of(inputs(), variant_, blocks_).gate_flops;
    return checked;
  }

  double run(Profile& stages) override {
    Profile profile;
    select_blocks(inputs().q.tensor, inputs().k.tensor, one_sequence(inputs().setting.tokens),
                  routing_of(variant_), blocks_.data(), inputs().execution(&profile));
    add(stages, profile);
    return profile.gate;
  }

  Samples sample() override {
    Samples samples;
    const std::int64_t width = blocks_.width;
    for (const Slice& probe : inputs().probes) {
      for (std::int64_t head = 0; head < inputs().setting.heads; ++head) {
        const auto first = static_cast<std::size_t>((head * blocks_.slice.count + probe.first) * width);
        samples.push_back(std::as_writable_bytes(
            std::span(blocks_.blocks).subspan(first, static_cast<std::size_t>(probe.count * width))));
      }
    }
    return samples;
  }

 private:
  const Inputs& inputs() const { return shared_->inputs; }

  std::shared_ptr<Shared> shared_;
  Variant variant_;
  Blocks blocks_;
};

/// The gradients, and what they are checked with, alike for all variants.
struct SharedGradients {
  Array d_out, dq, dk, dv, reference_dk, reference_dv;

  explicit SharedGradients(const Shared& shared) {
    const Setting& s = shared.inputs.setting;
    d_out = shared.filled(Role::d_out, s.heads);
    dq = shared.array(s.tokens, s.heads);
    for (Array* array : {&dk, &dv, &reference_dk, &reference_dv}) *array = shared.array(s.tokens, s.kv_heads);
  }
};

class Backward : public BenchCase {
 public:
  Backward(std::shared_ptr<Shared> shared, std::shared_ptr<SharedGradients> gradients, const Variant& variant)
      : shared_(std::move(shared)),
        gradients_(std::move(gradients)),
        variant_(variant),
        out_(shared_->array(inputs().setting.tokens, inputs().setting.heads)),
        lse_(static_cast<std::size_t>(inputs().setting.heads * inputs().setting.tokens)),
        blocks_(inputs(), variant, inputs().slices.front()) {}

  Checked check() override {
    const Tensor &k = inputs().k.tensor, &v = inputs().v.tensor;
    attention(inputs().q.tensor, k, v, one_sequence(inputs().setting.tokens), routing_of(variant_),
              {.out = out_.tensor, .lse = lse_.data(), .selection = blocks_.data()}, inputs().execution());
    Checked checked;
    check_probes(inputs(), variant_, blocks_, &out_.tensor, checked);

    for (const Array* array : {&gradients_->dq, &gradients_->dk, &gradients_->dv})
      poison(array->memory.bytes());
    checked.seconds = checked.wall_seconds = run(checked.stages);
    for (const Slice& probe : inputs().probes) check_gradients(probe);
    check_totals();
    checked.work = work_of(inputs(), variant_, blocks_);
    checked.work.attention_flops *= 10.0 / 4;
    checked.work.gate_flops = 0;  // the forward's selection is reused
    return checked;
  }

  double run(Profile& stages) override {
    Profile profile;
    const double seconds = seconds_of([&] {
      attention_backward(gradients_->d_out.tensor, inputs().q.tensor, inputs().k.tensor, inputs().v.tensor,
                         {.out = out_.tensor, .lse = lse_.data(), .selection = blocks_.data()},
                         one_sequence(inputs().setting.tokens), routing_of(variant_),
                         {gradients_->dq.tensor, gradients_->dk.tensor, gradients_->dv.tensor},
                         inputs().execution(&profile));
    });
    add(stages, profile);
    return seconds;
  }

  Samples sample() override {
    Samples samples;
    for (const Array* array : {&gradients_->dq, &gradients_->dk, &gradients_->dv}) {
      for (const auto& rows : sample_rows(inputs(), *array)) samples.push_back(rows);
    }
    return samples;
  }

 private:
  const Inputs& inputs() const { return shared_->inputs; }

  /// dq of a probe's rows; at the end of the sequence also dk and dv of their keys, which no later query
  /// sees.
  void check_gradients(const Slice& probe) {
    const Setting& s = inputs().setting;
    std::vector<float> lse;
    for (std::int64_t head = 0; head < s.heads; ++head) {
      const float* from = lse_.data() + head * s.tokens + probe.first;
      lse.insert(lse.end(), from, from + probe.count);
    }
    Blocks blocks = blocks_.cut(inputs(), variant_, probe);
    const Array dq(s.dtype, probe.count, s.heads, s.head_dim);
    const auto rows = [&](const Array& array) { return rows_of(array.tensor, probe.first, probe.count); };
    const Tensor dk = rows_of(gradients_->reference_dk.tensor, 0, probe.end()),
                 dv = rows_of(gradients_->reference_dv.tensor, 0, probe.end());
    attention_backward(rows(gradients_->d_out), rows(inputs().q), inputs().keys(probe.end()),
                       inputs().values(probe.end()),
                       {.out = rows(out_), .lse = lse.data(), .selection = blocks.data()},
                       one_sequence(probe.count, probe.end()), routing_of(variant_), {dq.tensor, dk, dv},
                       inputs().reference());
    const double tolerance = gradient_tolerance(s.dtype);
    compare_rows("dq", rows(gradients_->dq), dq.tensor, probe.first, tolerance);
    if (probe.end() != s.tokens) return;
    compare_rows("dk", rows(gradients_->dk), rows(gradients_->reference_dk), probe.first, tolerance);
    compare_rows("dv", rows(gradients_->dv), rows(gradients_->reference_dv), probe.first, tolerance);
  }

  /// Checks the invariants over all rows: weights add up to 1, so dv adds up to d_out; and the logits'
  /// gradient reaches q and k alike, so <q, dq> and <k, dk> add up to the same.
  void check_totals() {
    const Setting& s = inputs().setting;
    const double tolerance = gradient_tolerance(s.dtype);
    for (std::int64_t head = 0; head < s.kv_heads; ++head) {
      const Totals queries = totals(inputs().q, gradients_->dq, gradients_->d_out,
                                    head * inputs().heads_per_kv(), inputs().heads_per_kv());
      const Totals keys = totals(inputs().k, gradients_->dk, gradients_->dv, head, 1);
      compare("the sum of dv", head, keys.values, queries.values, queries.values_size, tolerance);
      compare("the sum of <k, dk>", head, keys.products, queries.products, queries.products_size, tolerance);
    }
  }

  struct Totals {
    double values = 0, values_size = 0, products = 0, products_size = 0;
  };

  static Totals totals(const Array& array, const Array& gradient, const Array& values, std::int64_t head,
                       std::int64_t heads) {
    Totals total;
    const auto [tokens, all_heads, head_dim, unused] = array.tensor.sizes;
    double squares = 0;
    for (std::int64_t row = 0; row < tokens; ++row) {
      const std::int64_t begin = (row * all_heads + head) * head_dim;
      double product = 0;
      for (std::int64_t i = begin; i < begin + heads * head_dim; ++i) {
        const double value = get(values.tensor, i);
        product += static_cast<double>(get(array.tensor, i)) * get(gradient.tensor, i);
        total.values += value;
        squares += value * value;
      }
      total.products += product;
      total.products_size += std::fabs(product);
    }
    total.values_size = std::sqrt(squares);
    return total;
  }

  static void compare(const char* what, std::int64_t head, double found, double expected, double size,
                      double tolerance) {
    if (std::fabs(found - expected) <= tolerance * size) return;
    throw llm::DataError(
        fmt::format("{} at kv head {}: expected {}, what the queries' side adds up to, got {}", what, head,
                    expected, found));
  }

  std::shared_ptr<Shared> shared_;
  std::shared_ptr<SharedGradients> gradients_;
  Variant variant_;
  Array out_;
  std::vector<float> lse_;
  Blocks blocks_;
};

/// Tokens decoded one after the other against a full cache. A model's other layers would have emptied the
/// CPU's caches in between, so they are emptied here too, outside the clock.
class Decode : public BenchCase {
 public:
  Decode(const Setting& setting, const Variant& variant, const Conditions& conditions,
         const Parallel& parallel, Ceiling& ceiling)
      : inputs_(make_inputs(setting, {variant}, conditions, parallel)),
        variant_(variant),
        ceiling_(ceiling),
        cache_({setting.kv_heads, setting.head_dim, variant.chunk_size, setting.dtype}),
        query_dtype_(setting.dtype == DType::i8 ? DType::f32 : setting.dtype),
        q_(query_dtype_, kTokens, setting.heads, setting.head_dim),
        out_(query_dtype_, kTokens, setting.heads, setting.head_dim) {
    const Recipe recipe = recipe_of(setting, {variant}, conditions);
    fill(q_.tensor, Role::query, recipe, setting.tokens, parallel);
    constexpr std::int64_t kPart = 65536;
    const std::int64_t part = std::min(kPart, setting.tokens);
    const Array k(query_dtype_, part, setting.kv_heads, setting.head_dim),
        v(query_dtype_, part, setting.kv_heads, setting.head_dim);
    for (std::int64_t first = 0; first < setting.tokens; first += part) {
      const std::int64_t count = std::min(part, setting.tokens - first);
      const Tensor keys = rows_of(k.tensor, 0, count), values = rows_of(v.tensor, 0, count);
      fill(keys, Role::key, recipe, first, parallel);
      fill(values, Role::value, recipe, first, parallel);
      cache_.append(keys, values);
    }
  }

  Checked check() override {
    poison(out_.memory.bytes());
    Checked checked;
    checked.seconds = checked.wall_seconds = run(checked.stages);
    const Setting& s = inputs_.setting;
    const Array expected(query_dtype_, 1, s.heads, s.head_dim), fast(query_dtype_, 1, s.heads, s.head_dim);
    for (std::int64_t token = 0; token < kTokens; ++token) {
      const Slice last{s.tokens - 1, 1, 0};
      Blocks found(inputs_, variant_, last), reference(inputs_, variant_, last);
      const Tensor q = rows_of(q_.tensor, token, 1);
      attention(q, cache_, 0, routing_of(variant_), {.out = expected.tensor, .selection = reference.data()},
                inputs_.reference());
      attention(q, cache_, 0, routing_of(variant_), {.out = fast.tensor, .selection = found.data()},
                inputs_.execution());
      const auto tie = [&](std::int64_t, std::int64_t head) {
        return !std::ranges::equal(found.of(head, 0), reference.of(head, 0));
      };
      for (std::int64_t head = 0; head < s.heads; ++head) checked.ties += found.width > 0 && tie(0, head);
      compare_rows("out", rows_of(out_.tensor, token, 1), expected.tensor, s.tokens - 1,
                   output_tolerance(query_dtype_),
                   [&](std::int64_t row, std::int64_t head) { return found.width > 0 && tie(row, head); });
      count(reference, checked.work);
    }
    if (2 * checked.ties > kTokens * s.heads)
      throw llm::DataError("decode: most rows chose other blocks than the reference");
    checked.rows = kTokens;
    return checked;
  }

  double run(Profile& stages) override {
    Profile total;
    double seconds = 0;
    for (std::int64_t token = 0; token < kTokens; ++token) {
      ceiling_.sweep();
      Profile profile;
      seconds += seconds_of([&] {
        decode(rows_of(q_.tensor, token, 1), cache_, routing_of(variant_),
               {.out = rows_of(out_.tensor, token, 1)}, inputs_.execution(&profile));
      });
      add(total, profile);
    }
    for (double Profile::*stage : {&Profile::centroids, &Profile::gate, &Profile::plan, &Profile::attend})
      total.*stage /= kTokens;
    add(stages, total);
    return seconds / kTokens;
  }

  Samples sample() override { return {out_.memory.bytes()}; }

 private:
  static constexpr std::int64_t kTokens = 8;

  /// Adds a token's share of the work: every selected block of a kv head is read once, however many of its
  /// query heads chose it; so is every complete block's mean, in f32.
  void count(const Blocks& blocks, Work& work) const {
    const Setting& s = inputs_.setting;
    add(work, scaled(work_of(inputs_, variant_, blocks)));
    const bool i8 = s.dtype == DType::i8;
    const auto token_bytes =
        2.0 * (static_cast<double>(s.head_dim) * static_cast<double>(size_of(s.dtype)) + (i8 ? 4.0 : 0.0));
    double tokens = static_cast<double>(s.tokens * s.kv_heads), means = 0;
    if (blocks.width > 0) {
      tokens = 0;
      const std::int64_t complete = (s.tokens - 1) / variant_.chunk_size;
      means = static_cast<double>(complete * s.kv_heads);
      for (std::int64_t kv_head = 0; kv_head < s.kv_heads; ++kv_head) {
        std::set<std::int32_t> read;
        for (std::int64_t head = kv_head * inputs_.heads_per_kv();
             head < (kv_head + 1) * inputs_.heads_per_kv(); ++head)
          read.insert(blocks.of(head, 0).begin(), blocks.of(head, 0).end());
        read.erase(-1);
        for (const std::int64_t block : read)
          tokens +=
              static_cast<double>(std::min(variant_.chunk_size, s.tokens - block * variant_.chunk_size));
      }
    }
    work.read_bytes += (tokens * token_bytes + means * static_cast<double>(s.head_dim) * 4) / kTokens;
  }

  static Work scaled(Work work) {
    work.attention_flops /= kTokens;
    work.gate_flops /= kTokens;
    return work;
  }

  Inputs inputs_;
  Variant variant_;
  Ceiling& ceiling_;
  KvCache cache_;
  DType query_dtype_;
  Array q_, out_;
};

}  // namespace

std::vector<std::unique_ptr<BenchCase>> make_bench_cases(const Setting& setting,
                                                         const std::vector<Variant>& variants,
                                                         const Conditions& conditions,
                                                         const Parallel& parallel, Ceiling& ceiling) {
  std::vector<std::unique_ptr<BenchCase>> all;
  if (setting.pass == Pass::decode) {
    for (const Variant& variant : variants)
      all.push_back(std::make_unique<Decode>(setting, variant, conditions, parallel, ceiling));
    return all;
  }
  const auto shared = std::make_shared<Shared>(setting, variants, conditions, parallel);
  const auto gradients =
      setting.pass == Pass::backward ? std::make_shared<SharedGradients>(*shared) : nullptr;
  for (const Variant& variant : variants) {
    if (setting.pass == Pass::forward) all.push_back(std::make_unique<Forward>(shared, variant));
    if (setting.pass == Pass::gate) all.push_back(std::make_unique<Gate>(shared, variant));
    if (setting.pass == Pass::backward) all.push_back(std::make_unique<Backward>(shared, gradients, variant));
  }
  return all;
}

double needed_bytes(const Setting& s, const std::vector<Variant>& variants, const Conditions& conditions) {
  const auto count = static_cast<double>(variants.size()), tokens = static_cast<double>(s.tokens);
  const double row = static_cast<double>(s.head_dim) * static_cast<double>(size_of(s.dtype));
  const double q = tokens * static_cast<double>(s.heads) * row * std::min(1.0, s.share),
               k = tokens * static_cast<double>(s.kv_heads) * row;
  double largest = 0, all = 0;  // of the selections
  for (const Variant& variant : variants) {
    if (is_dense(variant, s.tokens)) continue;
    const double blocks = tokens * static_cast<double>(s.heads * variant.topk) * 4 * std::min(1.0, s.share);
    largest = std::max(largest, blocks);
    all += blocks;
  }
  const auto scratch = static_cast<double>(conditions.workspace_bytes);
  switch (s.pass) {
    case Pass::forward:
      return 2 * q + 2 * k + largest + scratch;
    case Pass::gate:
      return q + k + all + scratch;
    case Pass::backward:
      return (3 + count) * q + 6 * k + all + scratch;
    case Pass::decode:
      return count * (2 * k + tokens / 128 * static_cast<double>(s.kv_heads * s.head_dim) * 4) + 1.5e9 +
             scratch;
  }
  return 0;
}

}  // namespace moba::bench
