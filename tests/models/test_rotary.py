import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.models.rotary import rotary_angles, rotate


@settings(max_examples=30)
@given(positions=st.lists(st.integers(0, 100_000), min_size=1, max_size=6), half=st.integers(1, 8))
def test_it_is_a_rotation_of_complex_numbers(positions, half):
    ids = torch.tensor(positions)
    x = torch.randn(len(positions), 2 * half, dtype=torch.float64)
    out = rotate(x, *rotary_angles(ids, 2 * half, theta=10_000.0, dtype=torch.float64))
    frequencies = torch.tensor([10_000.0 ** (-2 * i / (2 * half)) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.exp(1j * ids[:, None] * frequencies)
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), -1), rtol=1e-9, atol=1e-9)


@given(shift=st.integers(0, 1000), first=st.integers(0, 50), second=st.integers(0, 50))
def test_scores_depend_on_the_distance_only(shift, first, second):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=generator)

    def score(i, j):
        at = [rotary_angles(torch.tensor(p), 8, theta=10_000.0, dtype=torch.float64) for p in (i, j)]
        return rotate(q, *at[0]) @ rotate(k, *at[1])

    torch.testing.assert_close(score(first, second), score(first + shift, second + shift), rtol=1e-9, atol=1e-9)


def test_half_precision_gets_angles_of_full_precision():
    ids = torch.tensor([40_000])
    cos, _ = rotary_angles(ids, 2, theta=10_000.0, dtype=torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    exact = torch.tensor(40_000.0, dtype=torch.float64).cos()
    torch.testing.assert_close(cos[0, 0].double(), exact, atol=4e-3, rtol=0)
