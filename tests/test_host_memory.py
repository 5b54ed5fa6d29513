"""Memory of other hosts than this, by the files in which Linux tells of it; and of this one."""

from hybridsp.host_memory import host_memory

GIB = 2**30


def test_host_memory_is_the_containers(tmp_path):
    meminfo, membership = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text(f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {48 * 2**20} kB\n")
    membership.write_text("0::/job/step\n")
    groups = tmp_path / "cgroups"
    (groups / "job" / "step").mkdir(parents=True)
    read = host_memory(meminfo, groups, membership)
    assert (read.total, read.available) == (64 * GIB, 48 * GIB)
    for folder, limit, used in (("job", 16 * GIB, 6 * GIB), ("job/step", "max", 5 * GIB)):
        (groups / folder / "memory.max").write_text(f"{limit}\n")
        (groups / folder / "memory.current").write_text(f"{used}\n")
    read = host_memory(meminfo, groups, membership)
    assert (read.total, read.available) == (16 * GIB, 10 * GIB)
    # What the page cache holds is there for the asking.
    (groups / "job" / "memory.stat").write_text(
        f"anon {GIB}\nfile {5 * GIB}\ninactive_file {3 * GIB}\nactive_file {GIB}\n"
    )
    assert host_memory(meminfo, groups, membership).available == 14 * GIB
    assert host_memory(tmp_path / "absent", groups, membership) is None


def test_host_memory_of_an_old_cgroup(tmp_path):
    meminfo, old = tmp_path / "meminfo", tmp_path / "cgroups" / "memory"
    meminfo.write_text(f"MemTotal: {64 * 2**20} kB\nMemAvailable: {48 * 2**20} kB\n")
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(str(16 * GIB))
    (old / "memory.usage_in_bytes").write_text(str(15 * GIB))
    stat = f"inactive_file 1\ntotal_inactive_file {8 * GIB}\ntotal_active_file {4 * GIB}\n"
    (old / "memory.stat").write_text(stat)
    assert host_memory(meminfo, old.parent, tmp_path / "absent").available == 13 * GIB


def test_the_least_of_all_groups_around_this_process_counts(tmp_path):
    meminfo, membership, groups = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "cgroups"
    meminfo.write_text(f"MemTotal: {64 * 2**20} kB\nMemAvailable: {48 * 2**20} kB\n")
    membership.write_text("1:cpu:/elsewhere\n0::/job/step\n")
    (groups / "job" / "step").mkdir(parents=True)
    for folder, limit, used in ((".", 32, 31), ("job", 8, 2), ("job/step", 16, 1)):
        (groups / folder / "memory.max").write_text(str(limit * GIB))
        (groups / folder / "memory.current").write_text(str(used * GIB))
    read = host_memory(meminfo, groups, membership)
    assert (read.total, read.available) == (8 * GIB, GIB)
    # More in use than is allowed, as where the limit was lowered: nothing is left, not less.
    (groups / "job" / "memory.current").write_text(str(9 * GIB))
    assert host_memory(meminfo, groups, membership).available == 0


def test_this_host_has_memory():
    found = host_memory()
    assert 2**29 < found.total < 2**50
    assert 0 < found.available <= found.total
