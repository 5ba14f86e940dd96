"""The DICOM door: answers C-ECHO, stores what C-STORE brings, and says when a study is complete. Its own process, no torch."""
