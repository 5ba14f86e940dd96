"""From the stored objects of a study to Hounsfield volumes that can be trusted.

`study` strings the steps together: `headers` reads each object up to its pixels and `slices` each image of it, `stacks`
splits the objects into slices that may share a volume, `series` chooses by `rules`, `geometry` places the slices on a grid
or refuses, `pixels` decodes them, `volume` puts them there. `stored`, `nifti` and `preview` keep the result.
"""
