"""Where the random numbers of the mechanism come from (`docs/privacy.md`, "Randomness").

One root of 128 bits of the operating system's entropy, shared by all processes of a run and never written anywhere,
from which the streams for sampling and for noise are spawned. Nothing here reads or advances the global generators
that `transformers` seeds with `seed=42`.
"""

import numpy as np
import torch


_SAMPLING, _NOISE = 0, 1
# Independent streams of one process's noise on the CPU, used in parallel.
CPU_STREAMS = 4
_MT19937_WORDS = 624
# torch's CPU generator state: an 8-byte seed, two 4-byte counters (`left`, `seeded`), an 8-byte index, then the words.
_COUNTERS = slice(8, 16)
_INDEX = slice(16, 24)
_WORDS = slice(24, 24 + 8 * _MT19937_WORDS)


class Randomness:
    """The random streams of one run.

    Args:
        seed (`int`, *optional*): makes the streams reproducible, and with that the run NOT PRIVATE: whoever knows the
            seed can subtract the noise. By default the operating system is asked for 128 fresh bits.

    Formal guarantees:
        Sampling and noise streams are independent of each other and of every other run. No process writes the root
        down; `entropy` exists so that it can be sent to the other processes of the same run.
    """

    def __init__(self, seed: int | None = None):
        self.entropy = np.random.SeedSequence(seed).entropy

    def sampling(self) -> np.random.Generator:
        """The stream of Poisson draws and microbatch labels: the same on every process of a run."""
        return np.random.Generator(np.random.PCG64DXSM(self._spawn(_SAMPLING)))

    def noise(self, device: torch.device | str = "cpu", process: int = 0) -> list[torch.Generator]:
        """The streams of Gaussian noise of one process, on the device that holds its gradients."""
        if torch.device(device).type == "cpu":
            seeds = [self._spawn(_NOISE, process, stream) for stream in range(CPU_STREAMS)]
            return [_fill_state(torch.Generator(), np.random.MT19937(seed)) for seed in seeds]
        # The generators of accelerators take a seed of 64 bits.
        seed = self._spawn(_NOISE, process).generate_state(1, np.uint64)[0]
        return [torch.Generator(device).manual_seed(int(seed))]

    def _spawn(self, *key: int) -> np.random.SeedSequence:
        return np.random.SeedSequence(self.entropy, spawn_key=key)


def _fill_state(generator: torch.Generator, source: np.random.MT19937) -> torch.Generator:
    """Give torch's CPU generator all 624 words of `source`'s state.

    `torch.Generator.manual_seed` keeps 32 bits of its argument on the CPU, so an adversary could try every seed and
    subtract the noise. Both libraries implement the Mersenne Twister, so a state that numpy fills from 128 bits fits;
    that torch then draws what numpy draws proves that the layout of the state is the one assumed.
    """
    words = source.state["state"]["key"]
    # Both begin by making the next 624 words: pos = 624 here, left = 1 there.
    source.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": _MT19937_WORDS}}
    state = generator.get_state()
    state[_COUNTERS] = torch.from_numpy(np.array([1, 1], dtype=np.int32).view(np.uint8))
    state[_INDEX] = 0
    state[_WORDS] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
    probe = torch.Generator().set_state(state)
    drawn = torch.randint(2**24, (2,), generator=probe).tolist()
    if drawn != (source.random_raw(2) % 2**24).tolist():
        raise RuntimeError(
            f"torch {torch.__version__} lays out the state of its CPU generator in an unknown way, so the noise could "
            "not be seeded with full entropy. Install a torch release that hf_dpclip supports."
        )
    return generator.set_state(state)
