"""The site's imaging settings reach the choice of series."""

import pytest

from worker import pipeline
from worker.core.errors import SettingsError
from worker.core.settings import ImagingSettings
from worker.imaging.rules import ImagingRules


def test_default_settings_are_the_default_rules() -> None:
    assert pipeline.rules(ImagingSettings(threads=1)) == ImagingRules(decode_threads=1)


def test_site_may_reorder_preferences_and_add_words() -> None:
    rules = pipeline.rules(ImagingSettings(preferences=("latest", "kernel"), never_descriptions=("research",)))
    assert rules.preferences == ("latest", "kernel")
    assert set(ImagingRules().never_descriptions) < set(rules.never_descriptions)


def test_unknown_preference_is_an_error_that_names_what_is_allowed() -> None:
    with pytest.raises(SettingsError, match="allowed are"):
        pipeline.rules(ImagingSettings(preferences=("prettiest",)))
