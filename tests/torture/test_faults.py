"""Writers under faults: what the campaigns found, and one call of every kind; all calls by `make torture`."""

from __future__ import annotations

from tests.torture.faults.campaign import attack

# Each was wrong once, or is of a way that no other case takes.
CASES = {
    # The journal is written by its descriptor, and the system's error names no file.
    ("client to TIFF", "a broken disk"): (1,),
    ("client to TIFF", "a disk that fills up"): (60,),
    ("client to OME-Zarr", "a broken disk"): (40,),
    ("client over a TIFF", "no space once"): (25,),
    # Half a plan got the plan's name, and half a marker counted as one.
    ("client by shards", "short writes"): (1, 14, 18),
    # A version without the configuration that names it stayed, and the repeat made another.
    ("publishing another version", "no rename"): (2,),
    ("publishing the first version", "a disk that fills up"): (40,),
    # A version whose name may not have reached the disk stayed, and the repeat made another.
    ("publishing the first version", "a broken disk"): (54,),
    # A copy's mode could not be set, and a list of tuples was the message.
    ("going back to a version", "no chmod"): (1,),
    ("report page", "a broken disk"): (1,),
    ("scaling", "a broken disk"): (2,),
    ("benchmark", "a broken disk"): (1,),
    ("export", "a broken disk"): (1,),
    ("export", "no space once"): (20,),
    # The key was refused where a file system knows no fsync.
    ("server's state", "no fsync"): (1,),
    # numpy writes pixels, and its error has neither a number nor a name.
    ("synthetic slices", "a broken disk"): (3,),
    ("client from HDF5", "no space once"): (20,),
    ("cells to OME-Zarr", "a broken disk"): (20,),
    ("client to OME-Zarr", "killed"): (90,),
    ("client by shards", "killed after half a write"): (12,),
    ("publishing another version", "killed"): (50,),
    ("export", "killed"): (15,),
}


def test_a_writer_that_meets_a_fault_says_so_and_leaves_nothing_half_written() -> None:
    found = attack(CASES)
    assert found.findings == {}
    assert found.counts.total() == sum(map(len, CASES.values()))
