import torch

from penstock.pipe.buffers import ALIGNMENT, BufferPool, round_up


def test_buffers_are_aligned_and_large_enough() -> None:
    pool = BufferPool()
    for nbytes in (1, 4096, 4097, 100_000):
        buffer = pool.take(nbytes)
        assert buffer.nbytes >= nbytes
        assert buffer.dtype == torch.uint8
        assert buffer.data_ptr() % ALIGNMENT == 0


def test_a_buffer_comes_back_when_the_last_view_is_gone() -> None:
    pool = BufferPool()
    buffer = pool.take(1000)
    place = buffer.data_ptr()
    view = buffer[64:128].view(torch.float32)
    del buffer
    other = pool.take(1000)
    assert other.data_ptr() != place, "a buffer was lent while a view of it was alive"
    del view
    again = pool.take(1000)
    assert again.data_ptr() == place
    assert pool.made == 2


def test_autograd_keeps_a_buffer() -> None:
    pool = BufferPool()
    buffer = pool.take(64)
    leaf = torch.empty(0).set_(buffer.untyped_storage(), 0, (4,), (1,)).fill_(3.0).requires_grad_()
    product = leaf * leaf
    del buffer
    leaf_gradient_of = leaf
    del leaf
    pool.take(64).fill_(255)
    product.sum().backward()
    assert leaf_gradient_of.grad is not None
    assert leaf_gradient_of.grad.tolist() == [6.0] * 4
    assert pool.made == 2


def test_buffers_of_an_outgrown_size_are_dropped() -> None:
    pool = BufferPool()
    small = pool.take(10)
    del small
    large = pool.take(10_000)
    assert large.nbytes == round_up(10_000) == 16384
    del large
    assert pool.take(10).nbytes == 16384
    assert pool.made == 2


def test_capacities_are_powers_of_two() -> None:
    assert [round_up(n) for n in (1, 4096, 4097, 8192, 8193)] == [4096, 4096, 8192, 8192, 16384]
