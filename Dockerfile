# docker build --tag hintkd .                                     torch from PyPI, which runs on NVIDIA GPUs and without one
# docker build --tag hintkd --build-arg TORCH_INDEX_URL=URL .     another build of torch, such as a smaller one for CPUs
# docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" hintkd demo
FROM python:3.11-slim

ENV OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# What the package needs, in layers of their own: a change of the source leaves them as they are.
WORKDIR /opt/hintkd
COPY pyproject.toml constraints.txt ./
ARG TORCH_INDEX_URL=
RUN pip install --quiet --constraint constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; extras = project['optional-dependencies']; \
      print(*(r for r in project['dependencies'] + extras['report'] + extras['cluster'] + extras['demo'] + extras['images'] if not r.startswith('hintkd')), sep='\n')" \
      > requirements.txt \
 && pip install --quiet --constraint constraints.txt --requirement requirements.txt

COPY . .
RUN pip install --quiet --no-deps --no-build-isolation . && rm -rf /opt/hintkd

# Any user id can run this: home and workspace are writable for all, and a mounted workspace keeps its owner.
RUN useradd --uid 1000 --home-dir /home/hintkd --create-home hintkd && mkdir /work && chmod 1777 /home/hintkd /work
ENV HOME=/home/hintkd USER=hintkd
USER hintkd
WORKDIR /work
ENTRYPOINT ["hintkd"]
CMD ["demo"]
