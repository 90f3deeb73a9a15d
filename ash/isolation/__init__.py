"""The insides of `ash.sandbox`: bubblewrap arguments, launch, cgroups, folders, the server's end of the bridge. Import `ash.sandbox`."""
