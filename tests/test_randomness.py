"""Where the random numbers come from, and where they do not."""

import numpy as np
import pytest
import torch
from checks import check_noise_law, check_uncorrelated

from hf_dpclip.privacy import Randomness, randomness


def noise(source, process=0, size=20_000):
    streams = source.noise("cpu", process)
    return torch.cat([torch.empty(size // len(streams)).normal_(generator=stream) for stream in streams])


def test_noise_is_standard_normal():
    check_noise_law(noise(Randomness()), 1.0)


def test_two_runs_share_nothing():
    check_uncorrelated(noise(Randomness()), noise(Randomness()))


def test_streams_of_one_process_share_no_noise():
    check_uncorrelated(*noise(Randomness()).chunk(4)[:2])


def test_processes_of_one_run_share_no_noise():
    root = Randomness()
    check_uncorrelated(noise(root, 0), noise(root, 1))


def test_a_seed_reproduces_everything():
    assert torch.equal(noise(Randomness(3)), noise(Randomness(3)))
    assert Randomness(3).sampling().integers(2**60) == Randomness(3).sampling().integers(2**60)


def test_the_root_reproduces_the_streams_on_another_process():
    root = Randomness()
    assert torch.equal(noise(Randomness(root.entropy)), noise(root))


def test_global_seeds_have_no_influence():
    torch.manual_seed(42)
    np.random.seed(42)
    first = noise(Randomness())
    torch.manual_seed(42)
    np.random.seed(42)
    check_uncorrelated(first, noise(Randomness()))


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    noise(Randomness())
    assert torch.equal(torch.rand(3), expected)


def test_the_root_has_128_bits():
    assert max(Randomness().entropy.bit_length() for _ in range(20)) > 120


def test_noise_depends_on_more_than_32_bits_of_the_seed():
    """torch's CPU generator keeps 32 bits of a seed, few enough to try them all and subtract the noise."""
    assert torch.equal(
        torch.rand(3, generator=torch.Generator().manual_seed(5)),
        torch.rand(3, generator=torch.Generator().manual_seed(5 + 2**32)),
    )
    check_uncorrelated(noise(Randomness(5)), noise(Randomness(5 + 2**32)))


class Seeded:
    """In the place of a generator on a device that this machine may not have: all that it draws follows from this."""

    def __init__(self, device):
        self.device = device

    def manual_seed(self, seed):
        self.seed = seed
        return self


def test_the_stream_of_an_accelerator_is_of_its_process_alone_and_has_64_bits(monkeypatch):
    monkeypatch.setattr(torch, "Generator", Seeded)
    root = Randomness()
    streams = [stream for process in range(20) for stream in root.noise("cuda", process)]
    seeds = [stream.seed for stream in streams]
    assert {stream.device for stream in streams} == {"cuda"}
    assert len(set(seeds)) == 20 and max(seeds) > 2**60
    assert root.noise("cuda", 3)[0].seed == seeds[3]
    assert Randomness().noise("cuda")[0].seed != seeds[0]


def test_the_whole_state_is_filled():
    state = Randomness().noise()[0].get_state()[randomness._WORDS].numpy().view(np.uint64)
    assert len(np.unique(state)) > 620


def test_an_unknown_state_layout_is_an_error_and_not_weak_noise(monkeypatch):
    monkeypatch.setattr(randomness, "_WORDS", slice(32, 32 + 8 * 624))
    with pytest.raises(RuntimeError, match="full entropy"):
        Randomness().noise()
