"""The layer shapes of published models: one list for the tests, the benchmarks and the command line."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One MoE layer: E experts, K of them per token, hidden size H, expert intermediate size I."""

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int

    @property
    def weight_bytes_per_expert(self) -> float:
        """Bytes of one expert's gate, up and down in NVFP4: 4.5 bits a weight with its block scales."""
        return 3 * self.hidden_size * self.intermediate_size * 4.5 / 8

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one call: 2 per multiply-add, three matrices, K routes a token."""
        return 6 * tokens * self.top_k * self.hidden_size * self.intermediate_size

    def touched_experts(self, tokens: int) -> float:
        """Expected number of experts with at least one token, under uniform routing."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)


MODELS = {
    "qwen3-30b-a3b": LayerShape(128, 8, 2048, 768),
    "qwen3-235b-a22b": LayerShape(128, 8, 4096, 1536),
    "deepseek-r1-ep8": LayerShape(32, 8, 7168, 2048),  # one of 8 expert-parallel shards, all routes local
    "mixtral-8x7b": LayerShape(8, 2, 4096, 14336),
    "gpt-oss-120b": LayerShape(128, 4, 2880, 2880),  # not multiples of 128
}

TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
