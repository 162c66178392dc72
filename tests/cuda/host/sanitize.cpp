// Every kernel once over buffers of exactly the size they may use, for address, undefined-behaviour and thread
// sanitizers. Values are the business of the tests in Python.
#include "kernels.cpp"

static std::mt19937_64 words(1);

static std::vector<u64> random_words(u64 count) {
    std::vector<u64> result(count);
    for (u64& word : result) word = words() & words(); // few bits set: coordinates are often equal
    return result;
}

// A side of so many codes, from the middle of a row on, that ends with an array: the codes, or what tells their scales.
static std::vector<u8> coded_side(u32 numel, u32 bits, bool integers, bool codes_last) {
    const u32 width = 37, before = 26, across = 8, columns = 5;
    std::vector<u8> side(sizeof(Codes));
    const auto put = [&](u32 size) {
        const u32 at = ((u32)side.size() + 3) / 4 * 4;
        side.resize(at + size);
        std::generate(side.begin() + at, side.end(), [] { return (u8)words(); });
        return at;
    };
    Codes codes = {};
    codes.bits = bits, codes.magnitude = 0xff, codes.divides = integers;
    const u32 head = std::min(numel, width - before), whole = (numel - head) / width, tail = (numel - head) % width;
    const u32 shapes[MOST_BOXES][3] = {{1, head, before}, {whole, width, 0}, {1, tail, 0}};
    u32 first = 0;
    for (const auto& [rows, columns_of_box, left] : shapes) {
        if (!rows || !columns_of_box) continue;
        CodeBox& box = codes.box[codes.boxes++];
        box.first = first, box.numel = rows * columns_of_box, box.columns = columns_of_box;
        first += box.numel;
        box.skip = left * bits % 8, box.stride = (box.skip + columns_of_box * bits + 7) / 8;
        box.across = across, box.width = columns, box.before = left % columns;
        if (!codes_last) box.codes = put(box.stride * rows);
        box.lines = put(4 * rows);
        for (u32 row = 0; row < rows; ++row) ((u32*)&side[box.lines])[row] = row / 3;
        box.scales = put(4 * across * ((rows + 2) / 3));
        if (integers) box.zeros = put(4 * across * ((rows + 2) / 3)), box.factors = put(4 * rows);
        if (codes_last) box.codes = put(box.stride * rows);
    }
    memcpy(side.data(), &codes, sizeof codes);
    side.shrink_to_fit();
    return side;
}

static void run(u32 numel, u32 blocks) {
    const u32 padded = (numel + 7) / 8 * 8;
    const std::vector<u64> base = random_words((u64)padded * BASE::BITS / 64),
                           tuned = random_words((u64)padded * TUNED::BITS / 64);
    std::vector<Tile> tiles;
    for (u32 start = 0; start < numel; start += TILE)
        tiles.push_back({(u64)start * BASE::BITS / 8, (u64)start * TUNED::BITS / 8, start / 8,
                         std::min(TILE, numel - start), 0});
    const u32 count = (u32)tiles.size();
    std::vector<u8> mask(padded / 8);
    std::vector<double> sums(count * SUMS), tails(count * SUMS);
    std::vector<u64> rows(ROWS * BINS), low(3 * LOW_BINS), firsts(count);
    std::vector<Bin> used(ROWS * BINS);
    Record record = {};
    u64 next = 0;
    u32 found = 0;

    ScanSettings settings = {};
    settings.rule = TOP;
    settings.eta = 1e-3;
    settings.cut = settings.tie = 1 << 20;
    settings.ties = 100, settings.take = 30;
    Search search = {};
    search.delta_count = search.weight_count = 1;
    search.shift = 16;
    for (const bool codes_last : {false, true}) {
        const std::vector<u8> one = coded_side(numel, 3, true, codes_last),
                              other = coded_side(numel, 8, false, codes_last);
        std::vector<float> values(numel), others(numel);
        on_host::launch(blocks, THREADS, numel,
                        [&] { decode(one.data(), other.data(), values.data(), others.data(), 1, &record); });
        on_host::launch(blocks, THREADS, numel,
                        [&] { decode((const u8*)base.data(), one.data(), nullptr, values.data(), 1, &record); });
    }
    on_host::launch(blocks, THREADS, numel, [&] {
        scan(tiles.data(), count, settings, (const u8*)base.data(), (const u8*)tuned.data(), mask.data(), sums.data(),
             &record, rows.data());
    });
    on_host::launch(1, 1, numel, [&] { place_ties(sums.data(), count, 1, 5, firsts.data(), &next); });
    on_host::launch(blocks, THREADS, numel, [&] {
        take_ties(tiles.data(), count, settings, (const u8*)base.data(), (const u8*)tuned.data(), mask.data(),
                  firsts.data(), &record);
    });
    on_host::launch(blocks, THREADS, numel, [&] {
        refine(tiles.data(), count, search, (const u8*)base.data(), (const u8*)tuned.data(), tails.data(), &record,
               low.data());
    });
    on_host::launch(blocks, THREADS, numel,
                    [&] { harvest(rows.data(), rows.size(), used.data(), &found); });
}

static std::vector<u8> random_codes(u64 numel, u32 bits) {
    const std::vector<u64> drawn = random_words(numel * bits / 64 + 1);
    return std::vector<u8>((const u8*)drawn.data(), (const u8*)drawn.data() + numel * bits / 8);
}

// A matrix both ways, and as many as there are blocks turned, counted and squared at a time.
template <class Real, class Panel, class Magnitudes, class Scores, class Squares>
static void run_spectra(Panel panel, Magnitudes magnitudes, Scores scores, Squares squares, u64 rows, u64 columns,
                        u32 blocks) {
    const u64 numel = rows * columns, all = blocks * numel;
    const std::vector<u8> base = random_codes(all, BASE::BITS), tuned = random_codes(all, TUNED::BITS);
    std::vector<Real> weights(all), deltas(all);
    std::vector<u64> sizes(blocks * 3 * BINS), places(blocks * 9 * SCORE_FIELDS);
    const std::vector<u32> chances(blocks * BINS, 1);
    const std::vector<Window> windows(blocks, Window{16, 1000, 8, 5});
    const auto launch = [&](auto body) { on_host::launch(blocks, THREADS, (u32)numel, body); };
    for (u32 turned = 0; turned < 2; ++turned)
        launch([&] {
            panel(base.data(), tuned.data(), blocks * rows, columns, turned ? rows : columns, turned, 0, numel,
                  weights.data(), deltas.data());
        });
    launch([&] { magnitudes(weights.data(), deltas.data(), numel, blocks, 0, sizes.data()); });
    launch([&] {
        scores(weights.data(), weights.data(), deltas.data(), numel, blocks, windows.data(), 8, 0, chances.data(),
               places.data());
    });
    std::vector<double> sums(blocks * ((rows + 6) / 7) * columns);
    launch([&] { squares(deltas.data(), rows, columns, blocks, 7, sums.data()); });
}

int main(int, char** sizes) {
    for (u32 blocks = 2; *++sizes; blocks = 3 - blocks) {
        const u32 size = (u32)atoi(*sizes);
        run(size, blocks);
        const u64 side = size % 100 + 1;
        run_spectra<float>(panel_float32, magnitudes_float32, scores_float32, squares_float32, side, 37, blocks);
        run_spectra<double>(panel_float64, magnitudes_float64, scores_float64, squares_float64, 37, side, blocks);
    }
    puts("clean");
}
