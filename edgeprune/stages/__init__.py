"""The stages of a build, one file each; `edgeprune.pipeline` lists them in order."""
