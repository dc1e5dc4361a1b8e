"""Storage that fails for a while is asked again; what another attempt would meet again is not."""

import errno

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from raytrain_adv.errors import StorageError
from raytrain_adv.storage.retry import may_be_temporary, retry
from raytrain_adv.storage.storage import storage_errors


class Flaky:
    """Fails with each of these errors in turn, then works."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def away() -> OSError:
    return OSError(errno.EIO, "Input/output error")


def test_work_that_storage_fails_twice_is_done_and_said():
    said: list[str] = []
    assert retry(Flaky(away(), away()), "not written", said.append, (0.0, 0.0)) == "done"
    assert len(said) == 2 and "not written ([Errno 5] Input/output error)" in said[0]
    assert "trying again in 0 s" in said[1]


def test_storage_that_stays_away_is_an_error_in_the_end():
    with pytest.raises(OSError, match="Input/output"):
        retry(Flaky(away(), away()), "not written", lambda text: None, (0.0,))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_what_would_be_met_again_is_not_tried_again(number):
    said: list[str] = []
    with pytest.raises(OSError, match="no"):
        retry(Flaky(OSError(number, "no")), "not written", said.append, (0.0,))
    assert not said


def test_a_house_error_is_judged_by_what_caused_it():
    with pytest.raises(StorageError) as passing, storage_errors("not written", "there"):
        raise away()
    with pytest.raises(StorageError) as lasting, storage_errors("not written", "there"):
        raise OSError(errno.ENOSPC, "full")
    assert may_be_temporary(passing.value) and not may_be_temporary(lasting.value)
    assert not may_be_temporary(StorageError("a checkpoint is damaged"))


def test_all_ranks_failures_decide_whether_all_try_again():
    """Each rank gets every rank's failure from DCP: one full disk ends it for all."""

    def failures(*errors: Exception) -> CheckpointException:
        return CheckpointException("save", {rank: (e, None) for rank, e in enumerate(errors)})  # type: ignore[misc] # the stack is not looked at

    assert may_be_temporary(failures(away(), away()))
    assert not may_be_temporary(failures(away(), OSError(errno.ENOSPC, "full")))
    assert not may_be_temporary(failures(ValueError("no tensor")))
    # It is no Exception.
    assert retry(Flaky(failures(away())), "saving", lambda _: None, waits_s=(0,)) == "done"


def test_an_object_store_s_error_without_a_number_may_pass():
    assert may_be_temporary(OSError("AWS Error NETWORK_CONNECTION during PutObject operation"))
