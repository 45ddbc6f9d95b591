import torch

from penstock.pipe.buffers import ALIGNMENT, BufferPool, round_up


def test_buffers_are_aligned_and_as_large_as_asked_for() -> None:
    pool = BufferPool()
    for nbytes in (1, 4096, 4097, 100_000):
        buffer = pool.take(nbytes)
        assert buffer.nbytes == buffer.tensor.nbytes == len(buffer.memory) == nbytes
        assert buffer.tensor.dtype == torch.uint8
        assert buffer.tensor.data_ptr() % ALIGNMENT == 0


def test_a_lent_buffer_comes_back_when_the_last_view_is_gone() -> None:
    pool = BufferPool()
    buffer = pool.take(1000)
    place = buffer.tensor.data_ptr()
    lent = pool.lend(buffer)
    view = torch.frombuffer(lent, dtype=torch.float32, count=16, offset=64)[3:]
    del buffer, lent
    assert pool.take(1000).tensor.data_ptr() != place, "a buffer was free while a view of it was alive"
    del view
    assert pool.take(1000).tensor.data_ptr() == place
    assert pool.made == 2


def test_autograd_keeps_a_buffer() -> None:
    pool = BufferPool()
    leaf = torch.frombuffer(pool.lend(pool.take(64)), dtype=torch.float32, count=4).fill_(3.0).requires_grad_()
    product = leaf * leaf
    leaf_gradient_of = leaf
    del leaf
    pool.take(64).tensor.fill_(255)
    product.sum().backward()
    assert leaf_gradient_of.grad is not None
    assert leaf_gradient_of.grad.tolist() == [6.0] * 4
    assert pool.made == 2


def test_buffers_of_another_size_are_let_go() -> None:
    pool = BufferPool()
    pool.give(pool.take(4096))
    large = pool.take(16384)
    pool.give(large)
    assert pool.take(16384) is large
    pool.give(large)
    assert pool.take(4096).nbytes == 4096
    assert pool.take(16384) is not large
    assert pool.made == 4


def test_capacities_are_powers_of_two() -> None:
    assert [round_up(n) for n in (1, 4096, 4097, 8192, 8193)] == [4096, 4096, 8192, 8192, 16384]
