#!/usr/bin/env python3
"""Writes a CycloneDX list of what is in each of our programs, from Cargo.lock by way of `cargo metadata`.

Only what is compiled into the programs: no development or build dependencies, for the platforms of deny.toml. The same
lockfile gives the same bytes, so two lists can be compared. Usage: sbom.py FOLDER
"""

import json
import pathlib
import subprocess
import sys

PROGRAMS = ["lomash-product", "lomash-analytics", "lomash-notification", "lomash"]
PLATFORM = "x86_64-unknown-linux-gnu"


def metadata():
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--filter-platform", PLATFORM]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def checksums(root):
    """The registry's checksum of each package, from the lockfile, which is simple enough to be read by lines."""
    found, package = {}, {}
    for line in (pathlib.Path(root) / "Cargo.lock").read_text().splitlines():
        if line == "[[package]]":
            package = {}
        elif " = " in line:
            name, value = line.split(" = ", 1)
            package[name] = value.strip('"')
            if name == "checksum":
                found[package["name"], package["version"]] = package["checksum"]
    return found


def closure(start, nodes):
    seen, open_ = set(), [start]
    while open_:
        package = open_.pop()
        if package in seen:
            continue
        seen.add(package)
        for dependency in nodes[package]["deps"]:
            if any(kind["kind"] is None for kind in dependency["dep_kinds"]):
                open_.append(dependency["pkg"])
    return seen


def component(package, checksum):
    entry = {
        "type": "library",
        "bom-ref": f"pkg:cargo/{package['name']}@{package['version']}",
        "name": package["name"],
        "version": package["version"],
        "purl": f"pkg:cargo/{package['name']}@{package['version']}",
    }
    if package["license"]:
        entry["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    if checksum:
        entry["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    return entry


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    data = metadata()
    packages = {package["id"]: package for package in data["packages"]}
    nodes = {node["id"]: node for node in data["resolve"]["nodes"]}
    sums = checksums(data["workspace_root"])
    ref = lambda package: f"pkg:cargo/{packages[package]['name']}@{packages[package]['version']}"
    for name in PROGRAMS:
        start = next(package for package in data["workspace_members"] if packages[package]["name"] == name)
        inside = sorted(closure(start, nodes), key=ref)
        listed = [packages[package] for package in inside if package != start]
        bom = {
            "bomFormat": "CycloneDX",
            "specVersion": "1.5",
            "version": 1,
            "metadata": {"component": {**component(packages[start], None), "type": "application"}},
            "components": [component(package, sums.get((package["name"], package["version"]))) for package in listed],
            "dependencies": [
                {
                    "ref": ref(package),
                    "dependsOn": sorted({ref(to["pkg"]) for to in nodes[package]["deps"] if to["pkg"] in inside}),
                }
                for package in inside
            ],
        }
        file = folder / f"{name}.cdx.json"
        file.write_text(json.dumps(bom, indent=1, sort_keys=True) + "\n")
        print(f"{file}: {len(listed)} components")


main()
