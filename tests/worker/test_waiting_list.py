"""A long waiting list drains without a flood in the broker and slows nothing down."""

import pytest

from tests.worker.hospital_site import Site, wait_for
from worker import queues
from worker.core.records import Priority, ReportVersion, Study, StudyStatus


def drain(site: Site, count: int, seconds: float) -> tuple[int, int]:
    """Drafts `count` studies that wait, and a STAT study that comes when a fifth is done.

    Returns the most messages that lay in one queue meanwhile, and how many studies the STAT study waited for.
    """
    site.environment |= {"MU2_IMAGING__MIN_SLICES": "2"}
    for _ in range(count):
        site.add_study(slices=2, side=8)
    site.start_worker()
    doorbell = site.doorbell()
    most = 0

    def drafted(wanted: int) -> bool:
        nonlocal most
        most = max(most, *(doorbell.waiting(name) for name in queues.QUEUES))
        return site.count(ReportVersion) >= wanted

    wait_for(lambda: drafted(count // 5), seconds)
    before = site.count(Study, Study.status == StudyStatus.DRAFTED)
    stat = site.add_study(slices=2, side=8, priority=Priority.STAT)
    doorbell.ring(queues.PREPARE, stat)
    site.wait_for_status(stat, StudyStatus.DRAFTED)
    overtaken = site.count(Study, Study.status == StudyStatus.DRAFTED) - before
    wait_for(lambda: drafted(count + 1), seconds)
    return most, overtaken


def test_fifty_waiting_studies_need_a_few_doorbells_and_a_stat_study_overtakes_them(site: Site) -> None:
    most, waited_for = drain(site, 50, seconds=100)
    assert most <= queues.ENOUGH_RINGS
    assert waited_for < 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_thousand_waiting_studies_need_a_few_doorbells_and_a_stat_study_overtakes_them(site: Site) -> None:
    most, waited_for = drain(site, 1000, seconds=400)
    assert most <= queues.ENOUGH_RINGS
    assert waited_for < 20
