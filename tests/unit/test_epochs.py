"""Epochs of the ring in a rendezvous store: one place a rank, and an end that comes once."""

import random

from pipeline.comm.epochs import Epoch


class Store(dict):
    """As torch.distributed's."""

    def compare_set(self, key, expected, wanted):
        if self.get(key, b"") == expected.encode():
            self[key] = wanted.encode()
        return self[key]

    def get(self, key, default=None):
        return super().get(key, default) if default is not None else self[key]


def test_ranks_that_start_together_are_in_one_epoch():
    store = Store()
    epochs = [Epoch.enter(store, rank) for rank in range(4)]
    assert [epoch.number for epoch in epochs] == [0] * 4
    assert not any(epoch.is_over() for epoch in epochs)


def test_a_rank_that_was_started_again_ends_the_epoch():
    store = Store()
    first = [Epoch.enter(store, rank) for rank in range(3)]
    again = Epoch.enter(store, 1)
    assert again.number == 1 and not again.is_over() and all(epoch.is_over() for epoch in first)
    assert [Epoch.enter(store, rank).number for rank in (0, 2)] == [1, 1]


def test_all_ranks_that_were_started_again_meet():
    store = Store()
    for expected in (0, 1, 2):
        assert {Epoch.enter(store, rank).number for rank in random.Random(expected).sample(range(4), 4)} == {expected}


def test_an_epoch_that_several_end_is_followed_by_one():
    store = Store()
    first = [Epoch.enter(store, rank) for rank in range(3)]
    assert [epoch.end() for epoch in first] == [1, 1, 1]
    second = Epoch.enter(store, 0)
    first[1].end()  # a late one
    assert second.number == 1 and not second.is_over()
    second.end()
    assert Epoch.enter(store, 2).number == 2


def test_whatever_chance_does_the_last_of_each_rank_meet():
    """Processes are lost and started again at any moment; who notices that its epoch is over goes to the next."""
    for seed in range(200):
        chance, store, running = random.Random(seed), Store(), {}
        for _ in range(30):
            rank = chance.randrange(4)
            if rank not in running or chance.random() < 0.3:  # started, or started again
                running[rank] = Epoch.enter(store, rank)
            elif running[rank].is_over() or chance.random() < 0.2:  # its connection is lost
                running[rank].end()
                running[rank] = Epoch.enter(store, rank)
        for _ in range(2):
            for rank in range(4):
                if rank not in running or running[rank].is_over():
                    running[rank] = Epoch.enter(store, rank)
        assert len({epoch.number for epoch in running.values()}) == 1, seed
        assert not any(epoch.is_over() for epoch in running.values()), seed


def test_a_strangers_word_ends_the_epoch_and_no_thread():
    store = Store()
    epoch = Epoch.enter(store, 0)
    store["epoch"] = b"x"
    assert epoch.is_over()


def test_a_cause_is_known_to_all_whichever_epoch_they_are_in():
    """Told before the end of an epoch it is read by who ends it; told after that, it is passed on."""
    store = Store()
    late, early = Epoch.enter(store, 0), Epoch.enter(store, 1)
    late.pass_on("interrupted")
    assert not [key for key in store if "cause" in key]
    early.end()
    assert Epoch.enter(store, 1).number == 1
    late.pass_on("interrupted")
    assert store["1/watch/cause"] == b"interrupted"
    late.pass_on("another")
    assert store["1/watch/cause"] == b"interrupted"
    store["epoch"] = b"\xff"
    late.pass_on("interrupted")
