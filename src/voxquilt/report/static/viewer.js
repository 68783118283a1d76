"use strict";
// Shows the volumes of one subject with NiiVue, from the server, or on disk from a script beside the page.
(async () => {
  const $ = (id) => document.getElementById(id);
  const onDisk = location.protocol === "file:";
  const key = location.hash.slice(1);
  const CROSSHAIR = 0.6; // percent of the volume's width: less is thinner than a pixel in a small window, and not seen
  const say = (text) => { $("message").textContent = text; };

  function fail(error) {
    say(error instanceof Error ? error.message : String(error));
    document.body.dataset.error = "";
  }

  const frames = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));

  function loadScript(source) {
    return new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = source;
      script.onload = done;
      script.onerror = () => failed(new Error("There are no volumes of this subject beside the report: voxquilt-report --serve shows them."));
      document.body.append(script);
    });
  }

  async function ask(path) {
    const answer = await fetch(path);
    if (!answer.ok) throw new Error(await answer.text() || `The server answers ${answer.status}.`);
    return answer;
  }

  async function describe() {
    if (!onDisk) return (await ask(`volumes/${key}.json`)).json();
    await loadScript(`volumes/${key}.js`);
    return window.voxquiltSubject;
  }

  // How a volume is shown, as JSON behind its length, then a NIfTI file.
  async function read(number) {
    let bytes;
    if (onDisk) {
      const text = atob(subject.volumes[number].data);
      bytes = new Uint8Array(text.length);
      for (let n = 0; n < text.length; n += 1) bytes[n] = text.charCodeAt(n);
      bytes = bytes.buffer;
    } else {
      bytes = await (await ask(`volumes/${key}/${number}`)).arrayBuffer();
    }
    const length = new DataView(bytes).getUint32(0, true);
    const about = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, length)));
    return { about, file: bytes.slice(4 + length) };
  }

  const cache = new Map();
  const get = (number) => {
    if (!cache.has(number)) cache.set(number, read(number));
    return cache.get(number);
  };

  let subject;
  let nv;
  let shown = {}; // the place of image, labels and map among NiiVue's volumes, and what is known of them
  try {
    if (!window.niivue) throw new Error(`The viewer needs NiiVue, which is not installed: ${$("message").dataset.how}.`);
    subject = await describe();
    $("subject").textContent = subject.subject;
    document.title = `${subject.subject}: viewer`;
    $("back").href = `../report.html#s-${key}`;
    for (const step of ["previous", "next"]) {
      if (!subject[step]) continue;
      $(step).href = `#${subject[step]}`;
      $(step).hidden = false;
    }
    for (const kind of ["image", "labels", "map"]) {
      const found = subject.volumes.map((volume, n) => ({ ...volume, n })).filter((volume) => volume.kind === kind);
      $(kind).replaceChildren(
        ...found.map((volume) => new Option(volume.name, volume.n)),
        ...(kind === "image" && found.length ? [] : [new Option("none", "")]),
      );
      if (kind === "map") $(kind).value = "";
      $(kind).disabled = !found.length;
    }
    nv = new niivue.Niivue({
      dragAndDropEnabled: false, logLevel: "error", isNearestInterpolation: true, multiplanarShowRender: 0,
      isRadiologicalConvention: false, isColorbar: false, crosshairWidth: CROSSHAIR, crosshairWidthUnit: "percent", backColor: [0, 0, 0, 1],
      show3Dcrosshair: false, onLocationChange: tellPlace,
    });
    await nv.attachToCanvas($("canvas"));
    nv.setSliceType(nv.sliceTypeMultiplanar);
    await show();
    $("canvas").focus();
  } catch (error) {
    fail(error);
    return;
  }

  async function show() {
    delete document.body.dataset.ready;
    say("Loading");
    const place = nv.volumes.length ? [...nv.scene.crosshairPos] : null;
    const wanted = ["image", "labels", "map"].filter((kind) => $(kind).value !== "");
    const read = await Promise.all(wanted.map((kind) => get(Number($(kind).value))));
    shown = {};
    if (wanted.length) {
      await nv.loadVolumes(wanted.map((kind, n) => ({
        url: read[n].file, name: `${kind}.nii${read[n].about.packed ? ".gz" : ""}`,
        colormap: kind === "map" ? "inferno" : "gray", opacity: 1,
        cal_min: read[n].about.low, cal_max: read[n].about.high,
      })));
    }
    wanted.forEach((kind, n) => { shown[kind] = { place: n, about: read[n].about, value: $(kind).value }; });
    const labels = shown.labels;
    if (labels) {
      const classes = labels.about.classes;
      nv.volumes[labels.place].setColormapLabel({
        I: classes.map((c) => c.shown), R: classes.map((c) => c.colour[0]), G: classes.map((c) => c.colour[1]),
        B: classes.map((c) => c.colour[2]), A: classes.map((c) => (c.shown ? 255 : 0)), labels: classes.map((c) => c.name),
      });
      nv.updateGLVolume();
    }
    drawLegend(labels ? labels.about.classes : []);
    if (shown.image) [$("low").value, $("high").value] = [shown.image.about.low, shown.image.about.high].map((n) => Number(n.toPrecision(4)));
    const steps = read.map((volume) => volume.about).filter((about) => about.step > 1);
    $("reduced").hidden = !steps.length;
    if (steps.length) $("reduced").textContent = `Every ${ordinal(steps[0].step)} voxel along each axis is shown: the volume has ${steps[0].shape.join(" × ")}.`;
    if (place) nv.scene.crosshairPos = place;
    setOpacities();
    if (wanted.length) nv.createOnLocationChange();
    await frames();
    say("");
    document.body.dataset.ready = "";
  }

  function ordinal(n) {
    return n === 2 ? "second" : n === 3 ? "third" : `${n}th`;
  }

  function setOpacities() {
    if (shown.labels) nv.setOpacity(shown.labels.place, Number($("opacity").value));
    if (shown.map) nv.setOpacity(shown.map.place, Number($("mapopacity").value));
    nv.drawScene();
  }

  function setWindow() {
    const [low, high] = [$("low").valueAsNumber, $("high").valueAsNumber];
    if (!shown.image || !(high > low)) return;
    const volume = nv.volumes[shown.image.place];
    [volume.cal_min, volume.cal_max] = [low, high];
    nv.updateGLVolume();
  }

  function drawLegend(classes) {
    $("legend").replaceChildren(...classes.filter((c) => c.shown).map((c) => {
      const item = document.createElement("li");
      const space = "http://www.w3.org/2000/svg";
      const [swatch, square] = [document.createElementNS(space, "svg"), document.createElementNS(space, "rect")];
      swatch.setAttribute("aria-hidden", "true");
      for (const side of ["width", "height"]) square.setAttribute(side, "100%");
      square.setAttribute("fill", `rgb(${c.colour.join(",")})`);
      swatch.append(square);
      item.append(swatch, c.name === String(c.number) ? `label ${c.number}` : `${c.name} (${c.number})`);
      return item;
    }));
  }

  function tellPlace(data) {
    const parts = [`${[...data.mm].slice(0, 3).map((n) => n.toFixed(1)).join(", ")} mm`];
    const step = shown.image ? shown.image.about.step : shown.labels ? shown.labels.about.step : 1;
    parts.push(`voxel ${[...data.vox].map((n) => Math.round(n) * step).join(", ")}`);
    for (const [kind, volume] of Object.entries(shown)) {
      const value = data.values[volume.place] && data.values[volume.place].value;
      if (value === undefined) continue;
      const of = kind === "labels" && volume.about.classes[Math.round(value)];
      parts.push(of ? (of.shown ? `${of.name} (${of.number})` : "no label") : `${kind} ${Number(value.toPrecision(4))}`);
    }
    $("place").textContent = parts.join(" · ");
  }

  function go(step) {
    if (subject[step]) location.hash = subject[step];
  }

  for (const kind of ["image", "labels", "map"]) $(kind).addEventListener("change", () => show().catch(fail));
  for (const id of ["opacity", "mapopacity"]) $(id).addEventListener("input", setOpacities);
  for (const id of ["low", "high"]) $(id).addEventListener("change", setWindow);
  $("crosshair").addEventListener("change", () => {
    nv.opts.crosshairWidth = $("crosshair").checked ? CROSSHAIR : 0;
    nv.drawScene();
  });
  window.addEventListener("hashchange", () => location.reload());
  const moves = {
    ArrowUp: [0, 0, 1], ArrowDown: [0, 0, -1], ArrowRight: [1, 0, 0], ArrowLeft: [-1, 0, 0],
    PageUp: [0, 1, 0], PageDown: [0, -1, 0],
  };
  // Before NiiVue's own keys, of which some are letters.
  window.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement) return;
    if (event.key in moves) nv.moveCrosshairInVox(...moves[event.key]);
    else if (event.key === "o") { $("opacity").value = Number($("opacity").value) ? 0 : 0.5; setOpacities(); }
    else if (event.key === "n") go("next");
    else if (event.key === "p") go("previous");
    else if (event.key === "Escape") location.href = $("back").href;
    else return;
    event.preventDefault();
    event.stopPropagation();
  }, true);
})();
