"""Runs prompts of token ids through vLLM, for test_vllm.py, in the environment that has it: reads a list of jobs as JSON from
standard input, each with the options of vllm.LLM and rounds of prompts, and writes the generated ids of every prompt of every
round, or the error that refused the job, to the file that the first argument names."""

import json
import sys


def generate(job):
    from vllm import LLM, SamplingParams

    try:
        engine = LLM(enforce_eager=True, skip_tokenizer_init=True, **job["options"])
    except Exception as error:  # of the model, of vLLM or of the plugin
        return f"{type(error).__name__}: {error}"
    sampling = SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False
    )
    answers = []
    for prompts in job["rounds"]:
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
        answers.append(
            [
                {"ids": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens}
                for output in outputs
            ]
        )
    engine.llm_engine.engine_core.shutdown()
    return answers


if __name__ == "__main__":
    results = [generate(job) for job in json.load(sys.stdin)]
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)
