"""One optimizer step, restricted against full fine-tuning, norms only and PEFT LoRA, on a Qwen2.5-0.5B-shaped random model.

    python tests/benchmarks/bench_restrict.py --layers 24 --vocabulary 151936      # the whole model
    python tests/benchmarks/bench_restrict.py                                      # its width, 4 layers, small vocabulary

Arms take turns inside every round and the table has medians of CPU seconds (process time), so that a busy machine slows all
of them alike. Circuit: one head in four of the upper half of the layers, both key/value heads among them.
"""

import argparse
import copy
import random
import statistics
import time

import torch
import transformers
from peft import LoraConfig, get_peft_model

from circuits import Circuit, load
from interventions.masks import HeadMask
from interventions.restriction import restrict


def build(layers: int, vocabulary: int) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=layers, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).train()


class Stepper:
    """One arm with its own optimizer; `step()` returns CPU seconds."""

    def __init__(self, hf: torch.nn.Module, parameters: list, tokens: torch.Tensor):
        self.hf, self.parameters, self.tokens = hf, parameters, tokens
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step(self) -> float:
        start = time.process_time()
        self.hf(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.process_time() - start

    @property
    def state(self) -> int:
        """Bytes of optimizer state."""
        return sum(v.nbytes for s in self.optimizer.state.values() for v in s.values() if v.numel() > 1)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--vocabulary", type=int, default=8000)
    options.add_argument("--batch", type=int, nargs=2, default=(4, 128))
    options.add_argument("--rounds", type=int, default=3)
    given = options.parse_args()
    tokens = torch.randint(0, given.vocabulary, tuple(given.batch))
    base = build(given.layers, given.vocabulary)
    every = sum(parameter.numel() for parameter in base.parameters())
    upper = range(given.layers // 2, given.layers)
    circuit = Circuit([(layer, head) for layer in upper for head in (1, 5, 9)], given.layers, 14)
    arms: dict[str, Stepper] = {"full fine-tuning": Stepper(base, list(base.parameters()), tokens)}
    entered = []
    for name, heads, norms in (
        ("circuit + norms", circuit, "all"),
        ("norms only", circuit - circuit, "all"),
        ("circuit only", circuit, "none"),
    ):
        hf = copy.deepcopy(base)
        block = restrict(hf, HeadMask.from_circuit(heads, load(hf), norms=norms), verify=False)
        arms[name] = Stepper(hf.train(), list(block.__enter__().parameters()), tokens)
        entered.append(block)
    for name, layers in (("LoRA r=8 q,k,v,o", None), ("the same, in the circuit's layers", list(upper))):
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, layers_to_transform=layers)
        lora = get_peft_model(copy.deepcopy(base), config).train()
        arms[name] = Stepper(lora, [p for p in lora.parameters() if p.requires_grad], tokens)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(given.rounds + 1):
        # In another order each round: what the full step frees, whoever comes next has to map in again.
        for name in random.Random(round_).sample(list(arms), len(arms)):
            elapsed = arms[name].step()
            if round_:  # the first round makes optimizer states and warms caches
                seconds[name].append(elapsed)
    reference = statistics.median(seconds["full fine-tuning"])
    print(
        f"{every:,} parameters, batch {given.batch[0]} x {given.batch[1]}, {given.rounds} rounds, {torch.get_num_threads()} thread\n"
    )
    print("| arm | values that learn | share | CPU s / step | against full | optimizer state | state / share of full |")
    print("|---|---|---|---|---|---|---|")
    full_state = arms["full fine-tuning"].state
    for name, arm in arms.items():
        n = sum(parameter.numel() for parameter in arm.parameters)
        median = statistics.median(seconds[name])
        print(
            f"| {name} | {n:,} | {n / every:.2%} | {median:.2f} | {median / reference:.2f}x | {arm.state / 2**20:.1f} MiB "
            f"| {arm.state / full_state / (n / every):.3f} |"
        )
    for block in entered:
        block.__exit__(None, None, None)


if __name__ == "__main__":
    main()
