#!/usr/bin/env bash
# Builds the C++ for arm64 and for Windows, runs it under qemu and Wine, and compares it with this machine's (make cross).
#
#   tests/e2e/cross.sh [ARCHIVE.tar...]    images beside those that tests/imnet_prep/images/variants.py makes
#
# For Debian. What it lacks it installs, so it must run as root, or sudo must be there.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$PWD/build/cross
jpeg_version=2.1.5
jpeg_sha256=254f3642b04e309fee775123133c6464181addc150499561020312ec61c1bf7c
mkdir -p "$work"

need=()
while read -r command package; do
  command -v "$command" > /dev/null || need+=("$package")
done << 'LIST'
cmake cmake
nasm nasm
g++ g++
aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
x86_64-w64-mingw32-g++-posix g++-mingw-w64-x86-64-posix
qemu-aarch64-static qemu-user-static
/usr/lib/wine/wine64 wine64
LIST
[ -e /usr/include/jpegint.h ] || need+=(libjpeg-dev)
if [ ${#need[@]} -gt 0 ]; then
  root=$([ "$(id -u)" = 0 ] || echo sudo)
  $root apt-get update
  $root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "${need[@]}"
fi

# libjpeg-turbo as its authors released it, from Debian's source package.
jpeg=$work/libjpeg-turbo-$jpeg_version
archive=$work/libjpeg-turbo_$jpeg_version.orig.tar.gz
if [ ! -e "$archive" ]; then
  apt=$work/apt
  mkdir -p "$apt/sources.d" "$apt/lists"
  touch "$apt/sources.list"
  [ ! -e /etc/apt/sources.list ] || sed 's/^deb /deb-src /' /etc/apt/sources.list > "$apt/sources.list"
  for file in /etc/apt/sources.list.d/debian*.sources; do
    [ ! -e "$file" ] || sed 's/^Types: .*/Types: deb-src/' "$file" > "$apt/sources.d/$(basename "$file")"
  done
  options=(-o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts="$apt/sources.d"
    -o Dir::State::Lists="$apt/lists" -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update
  (cd "$apt" && apt-get "${options[@]}" source --download-only libjpeg-turbo)
  mv "$apt/$(basename "$archive")" "$archive"
fi
sha256sum --check --quiet - <<< "$jpeg_sha256  $archive"
tar -xzf "$archive" -C "$work"

# build NAME CMAKE_OPTION...: both libraries and their test programs; but for native, with a libjpeg of its own.
build() {
  local name=$1 found=()
  shift
  if [ "$name" != native ]; then
    local root=$work/$name/root
    cmake --log-level=WARNING -S "$jpeg" -B "$work/$name/jpeg" -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX="$root" \
      -DENABLE_SHARED=OFF -DWITH_TURBOJPEG=OFF -DREQUIRE_SIMD=ON -DCMAKE_POSITION_INDEPENDENT_CODE=ON "$@"
    cmake --build "$work/$name/jpeg" --parallel "$(nproc)" --target jpeg-static
    mkdir -p "$root"
    cp "$jpeg"/{jpeglib,jmorecfg,jerror,jpegint}.h "$work/$name/jpeg/"{jconfig.h,libjpeg.a} "$root"
    found=(-DJPEG_INCLUDE_DIR="$root" -DJPEG_LIBRARY="$root/libjpeg.a")
  fi
  cmake --log-level=WARNING -S . -B "$work/$name/ours" "$@" "${found[@]}"
  cmake --build "$work/$name/ours" --parallel "$(nproc)" --target imnet_digests mbv2_stress
}

# digests NAME COMMAND...: what the decoder of a build makes of the images.
digests() {
  local images=$work/$1/ours/imnet_prep/images/native
  "${@:2}" "$images/imnet_digests$(suffix "$1")" "$images/imnet_native.so" "${archives[@]}" 2> "$work/$1/decoder" |
    tr -d '\r' > "$work/$1/digests"
}

# operators NAME write|compare COMMAND...: the operators' results, to the file or compared with it.
operators() {
  local kernels=$work/$1/ours/mbv2/kernels
  "${@:3}" "$kernels/mbv2_stress$(suffix "$1")" "$kernels/mbv2_kernels.so" "$2" "$work/operators" |
    tr -d '\r' > "$work/$1/operators"
}

suffix() { [ "$1" != windows ] || echo .exe; }

# check NAME UNIT OPERATORS COMMAND...: runs a build by COMMAND and compares it with the native one.
check() {
  digests "$1" "${@:4}"
  grep -Fqx "decoder: libjpeg-turbo $jpeg_version, $2, own Huffman decoder" <(tr -d '\r' < "$work/$1/decoder") ||
    { echo "$1: not the decoder that was to run:"; cat "$work/$1/decoder"; return 1; }
  cmp "$work/native/digests" "$work/$1/digests"
  operators "$1" compare "${@:4}" || { cat "$work/$1/operators"; return 1; }
  grep -Fqx "operators: $3" "$work/$1/operators" || { cat "$work/$1/operators"; return 1; }
  echo "$1: $2 decoder, the same digests; $3 operators, $(grep largest "$work/$1/operators")"
}

archives=("$work/variants.tar" "$@")
.venv/bin/python -m tests.imnet_prep.images.variants "${archives[0]}"

build native
build arm64 -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
build windows -DCMAKE_SYSTEM_NAME=Windows -DCMAKE_SYSTEM_PROCESSOR=x86_64 \
  -DCMAKE_C_COMPILER=x86_64-w64-mingw32-gcc-posix -DCMAKE_CXX_COMPILER=x86_64-w64-mingw32-g++-posix

export WINEPREFIX=$work/wine WINEDEBUG=-all
digests native
operators native write
unit=$(cut -d, -f2 "$work/native/decoder" | tr -d ' ') kernels=$(sed -n 's/^operators: //p' "$work/native/operators")
echo "native: $unit decoder; $kernels operators; $(wc -l < "$work/native/digests") images," \
  "the SHA-256 of all digests begins with $(sha256sum "$work/native/digests" | cut -c1-16)"
check arm64 neon neon qemu-aarch64-static -L /usr/aarch64-linux-gnu
check windows "$unit" "${kernels/amx/avx512}" /usr/lib/wine/wine64  # only Linux can be asked for AMX
