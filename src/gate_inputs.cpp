#include "gate_inputs.h"

#include "number.h"

namespace moba {

BlockCount count_blocks(const std::vector<std::int32_t>& cu_seqlens_k, std::int64_t block_size) {
  BlockCount count;
  for (std::size_t s = 0; s + 1 < cu_seqlens_k.size(); ++s) {
    const std::int64_t keys = cu_seqlens_k[s + 1] - cu_seqlens_k[s], complete = keys / block_size;
    count.all += complete + (keys % block_size == 0 ? 0 : 1);
    count.complete += complete;
  }
  return count;
}

Call make_gate_call(const GateInputs& gate, const Sequences& sequences, const Routing& routing) {
  Call call;
  call.q = gate.q;
  call.k.dtype = call.v.dtype = gate.q.dtype;
  for (std::size_t s = 0; s + 1 < sequences.cu_seqlens_q.size(); ++s) {
    call.sequences.push_back({.q_begin = sequences.cu_seqlens_q[s],
                              .queries = sequences.cu_seqlens_q[s + 1] - sequences.cu_seqlens_q[s],
                              .keys = sequences.cu_seqlens_k[s + 1] - sequences.cu_seqlens_k[s]});
  }
  finish_call(call, routing, gate.k.sizes[1]);
  return call;
}

BlockMeans gate_keys(const Call& call, const Tensor& k, Scratch& scratch) {
  BlockMeans keys{.head_stride = k.strides[1], .block_stride = k.strides[0]};
  const auto* data = static_cast<const float*>(k.data);
  if (k.dtype != DType::f32) {
    keys.head_stride = k.sizes[2];
    keys.block_stride = k.sizes[1] * k.sizes[2];
    keys.storage = Buffer<float>(scratch, k.sizes[0] * keys.block_stride);
    float* to = keys.storage.data();
    for (std::int64_t block = 0; block < k.sizes[0]; ++block) {
      for (std::int64_t head = 0; head < k.sizes[1]; ++head) {
        for (std::int64_t d = 0; d < k.sizes[2]; ++d)
          *to++ = static_cast<float>(load(k.data, k.dtype, block * k.strides[0] + head * k.strides[1] + d));
      }
    }
    data = keys.storage.data();
  }
  std::int64_t blocks = 0;
  for (const SequenceView& s : call.sequences) blocks += call.blocks(s);
  const bool has_all = k.sizes[0] == blocks;
  for (const SequenceView& s : call.sequences) {
    keys.base.push_back(data);
    if (data != nullptr) data += (has_all ? call.blocks(s) : call.candidate_blocks(s)) * keys.block_stride;
  }
  return keys;
}

}  // namespace moba
